"""Loading a diffusion language model of any supported family, with quantisation and adapters."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dlm_tune.models.adapters import base_of_adapter, put_adapters
from dlm_tune.models.checkpoint_files import (
    check_weight_files,
    checkpoint_directory,
    is_adapter_directory,
    read_json,
)
from dlm_tune.models.families import FAMILIES, ModelFamily
from dlm_tune.models.lm_head import exclude_mask_logit
from dlm_tune.models.mixin import DiffusionMixin
from dlm_tune.models.quantization import quantization_config, steady_quantized_layers
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
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    is_trainable: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
    device_map: Any = None,
) -> Any:
    """Load a checkpoint as a bidirectional masked-diffusion model; no remote code is executed.

    Args:
        path_or_repo: directory or Hub name of a model, or of an adapter (its base is loaded with it).
        dtype: of the weights; "auto" keeps the files' own; None is float32 on CPU and bfloat16 on an accelerator.
        quantization: None, "4bit" (NF4, double quantisation), "8bit", or a BitsAndBytesConfig.
        adapter: directory or Hub name of a PEFT adapter to put on the model; or several, name -> directory or Hub
            name, of which the first is active until `model.set_adapter(name)`.
        is_trainable: whether training can go on from the adapter; else it is frozen.
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
        adapter = directory
        path_or_repo, revision = base_of_adapter(directory)
        directory = checkpoint_directory(path_or_repo, revision)
    config, family = load_config(directory)
    check_weight_files(directory)
    dtype = _resolve_dtype(dtype)
    model, report = model_class(config).from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        quantization_config=quantization_config(quantization, dtype),
        attn_implementation=attn_implementation,
        device_map=device_map,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that they are reported below, by name and with both shapes
        output_loading_info=True,
    )
    check_loading_report(report, directory, family)
    if getattr(model.config, "excludes_mask_logit", False):
        exclude_mask_logit(model)
    steady_quantized_layers(model)
    # The name and revision the user knows: adapters and model cards record them.
    model.name_or_path = model.config._name_or_path = str(path_or_repo)
    model.base_revision = None if revision == "main" else revision
    return model if adapter is None else put_adapters(model, adapter, is_trainable=is_trainable)


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


def model_class(config: PreTrainedConfig) -> Any:
    """Return the class that loads a checkpoint with this config: a `*ForCausalLM` with DiffusionMixin."""
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
