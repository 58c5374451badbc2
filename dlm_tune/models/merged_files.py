"""What lies beside the weights of a merged checkpoint: config, tokenizer, licence, and the record of the training."""

import json
import shutil
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import PreTrainedConfig

from dlm_tune.models.checkpoint_files import base_record, read_json
from dlm_tune.models.tokenizer import has_tokenizer_files

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
)
LICENCE_FILES = ("LICENSE*", "NOTICE*")
_BASE_FILES = ("generation_config.json", "*.py", *LICENCE_FILES)
_RUN_FILES = ("generation_config.json", "recipe.yaml", "results.json", "evaluation.json", "training.json")


def write_small_files(
    folder: Path,
    base_directory: Path,
    adapter_directory: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    base: str,
    base_quantization: str | None,
) -> None:
    """Write all files of a merged checkpoint but its weights.

    The tokenizer is the adapter's where there is one, the licence and code files are the base's, and recipe and
    figures of the training are the adapter's. `training.json` says what the base was and that this is a merge.

    Args:
        folder: of the merged checkpoint.
        base_directory: of the base.
        adapter_directory: of the adapter.
        config: of the merged model.
        dtype: of the written weights.
        base: name of the base; of a local path the last part is written.
        base_quantization: as in `merge_adapter`.
    """
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    copy_files(base_directory, _BASE_FILES, folder)
    copy_files(adapter_directory, _RUN_FILES, folder)
    copy_files(
        adapter_directory if has_tokenizer_files(adapter_directory) else base_directory, _TOKENIZER_FILES, folder
    )
    peft_config = PeftConfig.from_pretrained(str(adapter_directory))
    file = folder / "training.json"
    training = read_json(file) if file.is_file() else {}
    if "base_model" not in training or training.get(
        "base_model_is_local"
    ):  # the base of the merge may have a name that others know
        training |= base_record(base)
    content = {
        **training,
        "merged_adapter": {
            "peft_type": peft_config.peft_type.value,
            "r": getattr(peft_config, "r", None),
            "lora_alpha": getattr(peft_config, "lora_alpha", None),
            "base_quantization": base_quantization,
        },
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, patterns: tuple[str, ...], target: Path) -> None:
    """Copy the files of a folder whose names match one of the patterns."""
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
