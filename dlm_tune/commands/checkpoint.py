"""Loading of checkpoints and adapters for the verbs."""

from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from dlm_tune.models import load_model, load_tokenizer
from dlm_tune.models.checkpoint_files import read_json
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
    base = read_json(config_file).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{config_file} does not name its base checkpoint: give --model_name_or_path BASE --adapter "
            f"{model_name_or_path}."
        )
    base = resolve_path(base)
    if not Path(base).exists() and (base.count("/") != 1 or base.startswith((".", "/", "~"))):
        raise ValueError(
            f"{model_name_or_path} is an adapter of {base}, which does not exist (from {Path.cwd()}). If its base "
            f"checkpoint lies elsewhere now: --model_name_or_path BASE --adapter {model_name_or_path}; to train on "
            f"from it, write the place into base_model_name_or_path of {config_file}."
        )
    return base, model_name_or_path


def base_revision(model_name_or_path: str, model_revision: str | None) -> str | None:
    """Revision of the base checkpoint: the one that is asked for, else the one an adapter's folder names."""
    config_file = Path(model_name_or_path) / "adapter_config.json"
    if model_revision not in (None, "main") or not config_file.is_file():  # "main" is TRL's default
        return model_revision
    return read_json(config_file).get("revision") or model_revision


def load_checkpoint(
    arguments: Any, *, adapter: str | None = None, device_map: Any = None, is_trainable: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer that a verb's arguments name.

    Args:
        arguments: has `model_name_or_path`, `model_revision`, `dtype`, `attn_implementation`, `load_in_4bit`,
            `load_in_8bit`.
        adapter: LoRA adapter.
        device_map: where the weights go; None leaves them on the CPU.
        is_trainable: whether training goes on from the adapter.

    Raises:
        ValueError: no checkpoint is named, or it cannot be loaded; each message says what to do.
    """
    if not arguments.model_name_or_path:
        raise ValueError("model_name_or_path is missing: a folder or a Hub name, such as GSAI-ML/LLaDA-8B-Base.")
    base, adapter = find_base(arguments.model_name_or_path, adapter)
    revision = base_revision(arguments.model_name_or_path, arguments.model_revision)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype not in (None, "auto") else arguments.dtype
    model = load_model(
        base,
        dtype=dtype,
        quantization=quantization(arguments, dtype),
        adapter=adapter,
        is_trainable=is_trainable,
        attn_implementation=arguments.attn_implementation,
        revision=revision,
        device_map=device_map,
    )
    own = adapter if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file() else None
    tokenizer = load_tokenizer(own or base, revision=None if own else revision, model_config=model.config)
    return model, tokenizer


def quantization(arguments: Any, dtype: Any) -> str | BitsAndBytesConfig | None:
    """4 or 8 bits as `arguments` say; 4-bit NF4 with double quantisation unless its keys say otherwise."""
    if arguments.load_in_8bit:
        return "8bit"
    if not arguments.load_in_4bit:
        return None
    if not hasattr(arguments, "bnb_4bit_quant_type"):  # generate and chat
        return "4bit"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=arguments.use_bnb_nested_quant,
        bnb_4bit_quant_storage=arguments.bnb_4bit_quant_storage,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
    )


def inference_device_map(use_cpu: bool) -> dict[str, Any] | None:
    """Whole model on the accelerator, where there is one and it is wanted."""
    if use_cpu or not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # there is one
    return {"": torch.device(accelerator.type, torch.accelerator.current_device_index())}
