"""What an adapter must remember of its training beside weights, kept in adapter_config.json.

It lies in `auto_mapping`, the one field of PEFT's config that takes any keys and that other programs leave alone: what
the model is that it belongs to, so that another one is refused by name and shape, and what its training made of it.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dlm_tune.models.checkpoint_files import read_json
from dlm_tune.models.tokenizer import embedding_rows

_KEY = "dlm_tune"
_GUIDANCE_FACTS = ("guidance_keep_token_ids", "guidance_distillation_scale")
_SHAPE_FACTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_FAMILY_FACTS = ("model_type", "mask_token_id", "logits_shift")


def model_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """Family and shape of a model, by which an adapter knows it again."""
    names = (*_FAMILY_FACTS, *_SHAPE_FACTS)
    facts = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    return {**facts, "embedding_rows": embedding_rows(config)}


def write_adapter_facts(directory: str | Path, config: PreTrainedConfig) -> None:
    """Add the facts of the trained model's config to the adapter_config.json that PEFT wrote."""
    path = Path(directory) / "adapter_config.json"
    if not path.is_file():
        return
    guidance = {name: getattr(config, name) for name in _GUIDANCE_FACTS if getattr(config, name, None)}
    content = read_json(path)
    content["auto_mapping"] = {**(content.get("auto_mapping") or {}), _KEY: model_facts(config) | guidance}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter_facts(directory: str | Path) -> dict[str, Any]:
    """Return the facts in an adapter's directory; empty for adapters that were trained elsewhere."""
    mapping: dict[str, Any] = read_json(Path(directory) / "adapter_config.json").get("auto_mapping") or {}
    return mapping.get(_KEY) or {}


def guidance_facts(directory: str | Path) -> dict[str, Any]:
    """Return what the adapter's training with guidance made of the model."""
    facts = read_adapter_facts(directory)
    return {name: facts[name] for name in _GUIDANCE_FACTS if name in facts}


def apply_adapter_facts(directory: str | Path, config: PreTrainedConfig) -> None:
    """Set on the base model's config what the adapter remembers of its training."""
    for name, value in guidance_facts(directory).items():
        setattr(config, name, value)


def contradictions(directory: str | Path, config: PreTrainedConfig) -> list[str]:
    """Return what tells that a model is not the one an adapter was trained on, with both values."""
    expected, found = read_adapter_facts(directory), model_facts(config)
    wrong = [name for name in found if name in expected and expected[name] != found[name]]
    return [f"{name} is {expected[name]!r} in the adapter and {found[name]!r} in the model" for name in wrong]
