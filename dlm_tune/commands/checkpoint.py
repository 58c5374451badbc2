"""Loading of checkpoints and adapters for the verbs."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dlm_tune.models import load_model, load_tokenizer
from dlm_tune.shipped import resolve_path


def find_base(model_name_or_path: str, adapter: str | None) -> tuple[str, str | None]:
    """Base checkpoint and adapter, where the path may itself be an adapter's folder.

    Raises:
        ValueError: two adapters, or an adapter that does not name its base.
    """
    config_file = Path(model_name_or_path) / "adapter_config.json"
    if not config_file.is_file():
        return model_name_or_path, adapter
    if adapter is not None:
        raise ValueError(
            f"model_name_or_path={model_name_or_path} is an adapter, and adapter={adapter} is another one. Give "
            "the base checkpoint as model_name_or_path."
        )
    base = json.loads(config_file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{config_file} does not name its base checkpoint: give --model_name_or_path BASE --adapter "
            f"{model_name_or_path}."
        )
    return resolve_path(base), model_name_or_path


def load_checkpoint(
    arguments: Any, *, adapter: str | None = None, device_map: Any = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer that a verb's arguments name.

    Args:
        arguments: has `model_name_or_path`, `model_revision`, `dtype`, `attn_implementation`, `load_in_4bit`,
            `load_in_8bit`.
        adapter: LoRA adapter.
        device_map: where the weights go; None leaves them on the CPU.

    Raises:
        ValueError: no checkpoint is named, or it cannot be loaded; each message says what to do.
    """
    if not arguments.model_name_or_path:
        raise ValueError("model_name_or_path is missing: a folder or a Hub name, such as GSAI-ML/LLaDA-8B-Base.")
    base, adapter = find_base(arguments.model_name_or_path, adapter)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype not in (None, "auto") else arguments.dtype
    model = load_model(
        base,
        dtype=dtype,
        quantization="4bit" if arguments.load_in_4bit else "8bit" if arguments.load_in_8bit else None,
        adapter=adapter,
        attn_implementation=arguments.attn_implementation,
        revision=arguments.model_revision,
        device_map=device_map,
    )
    own = adapter if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file() else None
    tokenizer = load_tokenizer(
        own or base, revision=None if own else arguments.model_revision, model_config=model.config
    )
    return model, tokenizer


def inference_device_map(use_cpu: bool) -> dict[str, Any] | None:
    """Whole model on the accelerator, where there is one and it is wanted."""
    if use_cpu or not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # there is one
    return {"": torch.device(accelerator.type, torch.accelerator.current_device_index())}
