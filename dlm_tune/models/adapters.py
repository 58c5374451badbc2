"""PEFT adapters on diffusion language models: which layers they adapt, and the models they belong to."""

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from dlm_tune.models.adapter_facts import apply_adapter_facts, contradictions, guidance_facts
from dlm_tune.models.checkpoint_files import check_weight_files, checkpoint_directory, read_json
from dlm_tune.models.families import FAMILIES

logger = logging.getLogger(__name__)

# Of PEFT's config: names of layers that must exist
_NAME_FIELDS = {"target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save"}


def complete_peft_config(peft_config: PeftConfig, model: PreTrainedModel) -> PeftConfig:
    """Return the configuration of a new adapter with the family's layers where none are named, and names checked.

    PEFT itself adapts nothing at names that it does not find, as long as it finds one of them.

    Args:
        peft_config: is not changed.
        model: the model to adapt, of `load_model`, possibly on the meta device.

    Raises:
        ValueError: names that are no layers of the model, with those that are; LLaDA's original names with the
            native ones.
    """
    completed = copy.copy(peft_config)
    if completed.revision is None:
        completed.revision = getattr(model, "base_revision", None)
    if getattr(completed, "target_modules", "") is None and not getattr(completed, "target_parameters", None):
        completed.target_modules = set(FAMILIES[model.config.model_type].lora_target_modules)
    for name in _NAME_FIELDS:
        value = getattr(completed, name, None)
        if value is not None:
            setattr(completed, name, _checked_names(name, value, model))
    tokens = getattr(completed, "trainable_token_indices", None)
    if getattr(model.config, "excludes_mask_logit", False) and isinstance(tokens, Mapping) and "lm_head" in tokens:
        raise ValueError(
            "trainable_token_indices names lm_head, where PEFT leaves out the bias that keeps the mask token's column "
            "out of every softmax (excludes_mask_logit in the model's config.json): train the head with LoRA "
            "(target_modules) or whole (modules_to_save)"
        )
    return completed


def _checked_names(field: str, value: str | Iterable[str], model: PreTrainedModel) -> Any:
    modules = [name for name, _ in model.named_modules() if name]
    if isinstance(value, str):
        if value == "all-linear" or any(re.fullmatch(value, name) for name in modules):
            return value
        value = [value]  # TRL makes a plain string of a list of one name, which PEFT reads as a pattern
    # as PEFT matches: whole names of layers for targets, ends of names for what is saved whole
    separator = "." if field == "target_modules" else ""
    unknown = sorted(name for name in value if not any(f".{m}".endswith(separator + name) for m in modules))
    if not unknown:
        return set(value) if field == "target_modules" else list(value)
    native = FAMILIES[model.config.model_type].native_names
    renamed = [f"{name} -> {native[last]}" for name in unknown if (last := name.rpartition(".")[2]) in native]
    if renamed:
        raise ValueError(
            f"{field} (in a recipe {_NAME_FIELDS[field]}) has names of the authors' own code: write the native ones, "
            f"{'; '.join(renamed)}"
        )
    kinds = nn.Linear | nn.Embedding if field == "target_modules" else nn.Module
    available = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)}
    raise ValueError(
        f"{field} (in a recipe {_NAME_FIELDS[field]}) names {', '.join(map(repr, unknown))}, of which the model "
        f"{type(model).__name__} has none. It has {', '.join(sorted(n for n in available if n and not n.isdigit()))}"
    )


def base_of_adapter(directory: Path) -> tuple[str, str | None]:
    """Return name and revision of the model that an adapter was trained on.

    Raises:
        ValueError: the adapter does not say, or the model cannot be found.
    """
    settings = read_json(directory / "adapter_config.json")
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise ValueError(
            f"{directory} is an adapter whose adapter_config.json names no base_model_name_or_path; call "
            f"load_model(BASE, adapter={str(directory)!r})"
        )
    try:
        checkpoint_directory(base, revision)
    except ValueError as error:
        raise ValueError(
            f"{directory} is an adapter of base_model_name_or_path={base!r}, which cannot be loaded: {error}. If the "
            f"base model lies elsewhere, call load_model(BASE, adapter={str(directory)!r})"
        ) from error
    return str(base), revision


def put_adapters(
    model: PreTrainedModel, adapter: str | Path | Mapping[str, str | Path], *, is_trainable: bool = False
) -> PeftModel:
    """Put one adapter, or several by name, on the model they were trained on; the first is active.

    Args:
        model: of `load_model`.
        adapter: directory or Hub name; or name -> directory or Hub name.
        is_trainable: whether training can go on from the adapter.

    Raises:
        ValueError: an adapter of another model, damaged files, adapters that were trained for different guidance.
    """
    named = adapter if isinstance(adapter, Mapping) else {"default": adapter}
    if not named:
        raise ValueError("adapter={} names no adapter; give name: directory, or None")
    if is_trainable and len(named) > 1:
        raise ValueError(f"is_trainable=True with the adapters {', '.join(named)}: one is trained at a time")
    directories = {name: _adapter_directory(path, model) for name, path in named.items()}
    _check_guidance(directories)
    peft_model: PeftModel | None = None
    for name, directory in directories.items():
        try:
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(model, directory, name, is_trainable=is_trainable)
            else:
                peft_model.load_adapter(directory, name)
            _check_weights(peft_model, name, directory)
        except (RuntimeError, ValueError, IndexError) as error:
            raise _misfit(named[name], directory, model, _first_lines(error)) from error
        # what is saved after more training names the model that it was trained on, wherever that lies now
        peft_model.peft_config[name].base_model_name_or_path = model.name_or_path
        peft_model.peft_config[name].revision = getattr(model, "base_revision", None)
    assert peft_model is not None  # there is an adapter
    apply_adapter_facts(next(iter(directories.values())), model.config)
    return peft_model


def _adapter_directory(adapter: str | Path, model: PreTrainedModel) -> Path:
    """The directory of an adapter whose facts are those of the model."""
    directory = checkpoint_directory(adapter)
    if not (directory / "adapter_config.json").is_file():
        raise ValueError(f"adapter={str(adapter)!r} has no adapter_config.json; give the directory of a saved adapter")
    check_weight_files(directory, "adapter_model")
    differences = contradictions(directory, model.config)
    if differences:
        raise _misfit(adapter, directory, model, "; ".join(differences))
    trained_on = _trained_on(directory)
    if trained_on and not _is_same_place(trained_on, model.name_or_path):
        logger.warning(
            "the adapter %s was trained on %s and is put on %s. Family and shapes agree; it works as trained only if "
            "the weights are the same.",
            adapter,
            trained_on,
            model.name_or_path,
        )
    return directory


def _check_guidance(directories: Mapping[str, Path]) -> None:
    """Guidance is a setting of the whole model, so adapters side by side must agree on it."""
    facts = {name: guidance_facts(directory) for name, directory in directories.items()}
    (first, expected), *others = facts.items()
    for name, found in others:
        if found != expected:
            raise ValueError(
                f"the adapters {first!r} ({expected or 'no guidance'}) and {name!r} ({found or 'no guidance'}) were "
                "trained for different guidance, a setting of the whole model. Load each on a model of its own"
            )


def _check_weights(model: PeftModel, name: str, directory: Path) -> None:
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        difference = sorted(set(file.keys()) ^ set(get_peft_model_state_dict(model, adapter_name=name)))
    if difference:
        raise ValueError(f"{len(difference)} adapter weights have no counterpart ({', '.join(difference[:4])})")


def _misfit(adapter: str | Path, directory: Path, model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(
        f"the adapter {str(adapter)!r} (trained on {_trained_on(directory)!r}) does not fit the model "
        f"{model.name_or_path!r} ({type(model).__name__}): {reason}. Give the model it was trained on"
    )


def _trained_on(directory: Path) -> str | None:
    return read_json(directory / "adapter_config.json").get("base_model_name_or_path")


def _is_same_place(name: str, other: str) -> bool:
    return name == other or Path(name).resolve() == Path(other).resolve()


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".")
