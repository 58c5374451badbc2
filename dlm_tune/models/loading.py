"""Loading a diffusion language model of any supported family, with quantisation and adapters."""

import functools
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dlm_tune.models.adapter_facts import apply_adapter_facts
from dlm_tune.models.checkpoint_files import (
    check_weight_files,
    checkpoint_directory,
    is_adapter_directory,
    read_json,
)
from dlm_tune.models.families import FAMILIES, ModelFamily
from dlm_tune.models.mixin import DiffusionMixin
from dlm_tune.models.tokenizer import embedding_rows, tokenizer_mask_token_id

_UNSUPPORTED_TYPES = {
    "llada2_moe": "LLaDA2 has mixture-of-experts layers and attends block by block",
    "llada2_moe_veomni": "LLaDA2 has mixture-of-experts layers and attends block by block",
    "lladamoe": "LLaDA-MoE has mixture-of-experts layers",
    "llada_moe": "LLaDA-MoE has mixture-of-experts layers",
    "mamba": "a state-space model reads from left to right only and cannot attend in both directions",
    "mamba2": "a state-space model reads from left to right only and cannot attend in both directions",
}


def load_model(
    path_or_repo: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    quantization: str | BitsAndBytesConfig | None = None,
    adapter: str | Path | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    device_map: Any = None,
) -> Any:
    """Load a checkpoint as a bidirectional masked-diffusion model; no remote code is executed.

    Args:
        path_or_repo: directory or Hub name of a model, or of an adapter (its base is loaded with it).
        dtype: of the weights; "auto" keeps the files' own; None is float32 on CPU and bfloat16 on an accelerator.
        quantization: None, "4bit" (NF4, double quantisation), "8bit", or a BitsAndBytesConfig.
        adapter: directory or Hub name of a PEFT adapter to put on the model.
        attn_implementation: as in transformers ("sdpa", "eager", "flash_attention_2", ...).
        revision: of the Hub repository `path_or_repo`.
        device_map: as in transformers.

    Returns:
        A PreTrainedModel with DiffusionMixin in eval mode, or a PeftModel around one.

    Raises:
        ValueError: naming the file or setting at fault and the remedy: unknown path or family, a missing or
            impossible mask token, damaged or missing weights, an adapter of another model.
    """
    directory = checkpoint_directory(path_or_repo, revision)
    if is_adapter_directory(directory):
        if adapter is not None:
            raise ValueError(
                f"{path_or_repo} is itself an adapter, so adapter={str(adapter)!r} cannot be put on it; merge the "
                "first into its base model, or give the base model and one adapter"
            )
        adapter, path_or_repo = directory, _base_of_adapter(directory)
        directory = checkpoint_directory(path_or_repo)
    config, family = load_config(directory)
    check_weight_files(directory)
    dtype = _resolve_dtype(dtype)
    model_class = _model_class(config)
    model, report = model_class.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        quantization_config=_quantization_config(quantization, dtype),
        attn_implementation=attn_implementation,
        device_map=device_map,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that they are reported below, by name and with both shapes
        output_loading_info=True,
    )
    check_loading_report(report, directory, family)
    # The name the user knows: adapters and model cards record it.
    model.name_or_path = model.config._name_or_path = str(path_or_repo)
    return model if adapter is None else _put_adapter(model, adapter)


def load_config(directory: Path) -> tuple[PreTrainedConfig, ModelFamily]:
    """Return the config of a checkpoint directory, made bidirectional and with its mask token, and its family.

    Raises:
        ValueError: for an unsupported `model_type` or structure, or a mask token that is missing or out of range.
    """
    config, family = read_config(directory)
    config.mask_token_id = _resolve_mask_token_id(config, directory, family)
    return config, family


def read_config(directory: Path) -> tuple[PreTrainedConfig, ModelFamily]:
    """Return the config of a checkpoint directory, made bidirectional, and its family; it may lack a mask token.

    Raises:
        ValueError: for an unsupported `model_type` or structure.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{directory} has no config.json, so it is not a checkpoint; give the directory that holds it"
        )
    model_type = read_json(file).get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        reason = _UNSUPPORTED_TYPES.get(str(model_type), "its attention is not known to work in both directions")
        raise ValueError(
            f"model_type={model_type!r} in {file} is not supported: {reason}. Supported: {', '.join(FAMILIES)}"
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and "sliding_attention" in layer_types:
        raise ValueError(
            f"sliding_window={window} in {file}: every position must attend to all others. Set it to null if your "
            "texts fit into the window, else choose another model"
        )
    if not issubclass(_native_class(config), DiffusionMixin):
        config.is_causal = False
        config.logits_shift = bool(getattr(config, "logits_shift", family.logits_shift))
    return config, family


def _resolve_mask_token_id(config: PreTrainedConfig, directory: Path, family: ModelFamily) -> int:
    mask_token_id = getattr(config, "mask_token_id", None)
    if mask_token_id is None:
        mask_token_id = tokenizer_mask_token_id(directory, family)
    if mask_token_id is None:
        raise ValueError(
            f"the checkpoint {directory} (model_type {family.model_type!r}) has no mask token, without which nothing "
            "can be noised. Set mask_token_id in its config.json, or mask_token in its tokenizer_config.json, to a "
            "token whose embedding row the model does not use otherwise"
        )
    rows = embedding_rows(config)
    if not 0 <= mask_token_id < rows:
        raise ValueError(
            f"mask_token_id={mask_token_id} is outside the model's {rows} embedding rows (ids 0 to {rows - 1}); "
            f"correct mask_token_id in {directory / 'config.json'}, or resize the embeddings"
        )
    return mask_token_id


def _native_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _model_class(config: PreTrainedConfig) -> Any:
    native = _native_class(config)
    return native if issubclass(native, DiffusionMixin) else _bidirectional(native)  # type: ignore[arg-type]


@functools.cache
def _bidirectional(native: type[PreTrainedModel]) -> Any:
    """Mix DiffusionMixin into a decoder class, keeping its name so that `architectures` stays as published."""
    return type(
        native.__name__, (DiffusionMixin, native), {"__module__": native.__module__, "__doc__": native.__doc__}
    )


def _resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None:
        return torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is not a floating-point type; use float32, bfloat16, float16 or 'auto'")
    return resolved


def _quantization_config(
    quantization: str | BitsAndBytesConfig | None, dtype: torch.dtype | str
) -> BitsAndBytesConfig | None:
    if quantization is None or isinstance(quantization, BitsAndBytesConfig):
        return quantization
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise ValueError(f"quantization={quantization!r} is unknown; use None, '4bit', '8bit' or a BitsAndBytesConfig")


def check_loading_report(report: dict[str, Any], directory: Path, family: ModelFamily) -> None:
    """Raise ValueError where transformers' loading info tells of missing, unknown or misshapen weights."""
    faults = []
    for kind, wanted in (("missing_keys", "missing from the files"), ("unexpected_keys", "unknown to the model")):
        keys = sorted(map(str, report.get(kind) or ()))
        if keys:
            faults.append(f"{len(keys)} weights are {wanted} ({', '.join(keys[:4])}{', ...' if keys[4:] else ''})")
    mismatched = sorted(report.get("mismatched_keys") or (), key=str)
    if mismatched:
        shapes = [f"{name} is {list(found)} instead of {list(expected)}" for name, found, expected in mismatched[:3]]
        faults.append(f"{len(mismatched)} weights have another shape ({'; '.join(shapes)})")
    if faults:
        raise ValueError(
            f"the weights in {directory} are not those of its config.json (model_type {family.model_type!r}): "
            f"{' and '.join(faults)}. Loading them would leave parts of the model random; take config.json and "
            "weights from the same checkpoint"
        )


def _base_of_adapter(directory: Path) -> str:
    base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{directory} is an adapter whose adapter_config.json names no base_model_name_or_path; call "
            f"load_model(BASE, adapter={str(directory)!r})"
        )
    try:
        checkpoint_directory(base)
    except ValueError as error:
        raise ValueError(
            f"{directory} is an adapter of base_model_name_or_path={base!r}, which cannot be loaded: {error}. If the "
            f"base model lies elsewhere, call load_model(BASE, adapter={str(directory)!r})"
        ) from error
    return str(base)


def _put_adapter(model: PreTrainedModel, adapter: str | Path) -> PeftModel:
    directory = checkpoint_directory(adapter)
    if not (directory / "adapter_config.json").is_file():
        raise ValueError(f"adapter={str(adapter)!r} has no adapter_config.json; give the directory of a saved adapter")
    check_weight_files(directory, "adapter_model")
    try:
        peft_model = PeftModel.from_pretrained(model, directory)
        with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
            difference = sorted(set(file.keys()) ^ set(get_peft_model_state_dict(peft_model)))
        if difference:
            raise ValueError(f"{len(difference)} adapter weights have no counterpart ({', '.join(difference[:4])})")
    except (RuntimeError, ValueError) as error:
        trained_on = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"the adapter {str(adapter)!r} (trained on {trained_on!r}) does not fit the model "
            f"{model.name_or_path!r} ({type(model).__name__}): {_first_lines(error)}. Give the model it was trained on"
        ) from error
    apply_adapter_facts(directory, model.config)
    return peft_model


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".")
