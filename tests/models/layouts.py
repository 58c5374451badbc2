"""What the model tests read from checkpoints and models."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def config_json(directory: Path) -> dict[str, Any]:
    """config.json without the version of the library that wrote it."""
    content = json.loads((directory / "config.json").read_text())
    content.pop("transformers_version", None)
    return content


def saved_keys(directory: Path) -> set[str]:
    """Names of all tensors in the directory's safetensors files."""
    keys: set[str] = set()
    for file in directory.glob("*.safetensors"):
        if file.name != "reference.safetensors":
            with safe_open(file, framework="pt") as opened:
                keys |= set(opened.keys())
    return keys


def logits_of(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Raw logits (B, L, V) without gradients."""
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, attention_mask=attention_mask).logits
