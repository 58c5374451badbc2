"""What an adapter must remember of its training beside weights, kept in adapter_config.json.

It lies in `auto_mapping`, the one field of PEFT's config that takes any keys and that other programs leave alone.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dlm_tune.models.checkpoint_files import read_json

_KEY = "dlm_tune"
_FACTS = ("guidance_keep_token_ids", "guidance_distillation_scale")


def write_adapter_facts(directory: str | Path, config: PreTrainedConfig) -> None:
    """Add the facts of the trained model's config to the adapter_config.json that PEFT wrote."""
    path = Path(directory) / "adapter_config.json"
    facts = {name: getattr(config, name) for name in _FACTS if getattr(config, name, None)}
    if not facts or not path.is_file():
        return
    content = read_json(path)
    content["auto_mapping"] = {**(content.get("auto_mapping") or {}), _KEY: facts}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def apply_adapter_facts(directory: str | Path, config: PreTrainedConfig) -> None:
    """Set on the base model's config what the adapter remembers."""
    mapping: dict[str, Any] = read_json(Path(directory) / "adapter_config.json").get("auto_mapping") or {}
    facts = mapping.get(_KEY) or {}
    for name in _FACTS:
        if name in facts:
            setattr(config, name, facts[name])
