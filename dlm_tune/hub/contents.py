"""Which files of a folder are published, and what is changed in them on the way."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from dlm_tune.hub.card import make_card
from dlm_tune.hub.facts import RECIPE_FILE, CheckpointFacts, read_facts
from dlm_tune.hub.privacy import has_secret, known_secrets, shareable_settings, without_local_paths
from dlm_tune.models.checkpoint_files import check_weight_files, read_json

# Everything else stays here: optimiser states, pickles, logs, checkpoint-* folders, data, code.
PUBLISHED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model-?????-of-?????.safetensors",
    "adapter_model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    RECIPE_FILE,
    "training.json",
    "results.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
_PATH_KEYS = ("_name_or_path", "base_model_name_or_path", "name_or_path", "tokenizer_file")
_LARGEST_TEXT = 2**20  # bytes; secrets are not searched for in larger files, which are vocabularies


@dataclass
class Contents:
    """What a push would put into the repository.

    Attributes:
        files: path in the repository -> file on disk, or the bytes themselves where they are made or changed here.
        left_out: names in the folder that are not published.
        card: the model card, README.md among the files.
        facts: what the folder says of the checkpoint.
    """

    files: dict[str, Path | bytes]
    left_out: list[str]
    card: ModelCard
    facts: CheckpointFacts

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }


def collect(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    secrets: Sequence[str | None] = (),
) -> Contents:
    """Check a folder and gather what of it is published.

    Raises:
        ValueError: no checkpoint, damaged or missing weights, no mask token, an adapter of a base that only this
            machine has, or a file with something like a secret in it.
    """
    folder = Path(folder).expanduser()
    _check_folder(folder)
    facts = read_facts(folder, base_model)
    if facts.is_adapter and (facts.base_model is None or facts.base_is_local):
        raise ValueError(
            f"{folder} is an adapter of base_model_name_or_path="
            f"{facts.config.get('base_model_name_or_path')!r}, which nobody else has. Push the base too and name it "
            "with --base_model USER/NAME, or merge the adapter into it (`dlm-tune merge`) and push that"
        )
    found = known_secrets(*secrets)
    card = make_card(folder, repo_id=repo_id, base_model=base_model, license=license, secrets=found)
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_published(path.name):
            files[path.name] = path
        else:
            left_out.append(path.name + "/" * path.is_dir())
    files["README.md"] = str(card).encode()
    main = "adapter_config.json" if facts.is_adapter else "config.json"
    files[main] = _json(_shared_config(facts))
    if facts.recipe:
        settings = yaml.safe_dump(shareable_settings(facts.recipe, found), sort_keys=False, allow_unicode=True)
        files[RECIPE_FILE] = f"# The recipe of {repo_id}; local paths are cut to their last part.\n{settings}".encode()
    for name in ("tokenizer_config.json", "generation_config.json"):
        if name in files:
            content = read_json(folder / name)
            if (changed := _without_paths(content)) != content:
                files[name] = _json(changed)
    _check_secrets(folder, files, found)
    return Contents(files, left_out, card, facts)


def is_published(name: str) -> bool:
    """Whether a file of this name belongs to a published checkpoint."""
    return any(fnmatchcase(name, pattern) for pattern in PUBLISHED)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give the one that holds config.json or adapter_config.json")
    has_model, has_adapter = (folder / "config.json").is_file(), (folder / "adapter_config.json").is_file()
    if has_model and has_adapter:
        raise ValueError(
            f"{folder} holds a whole model (config.json) and an adapter (adapter_config.json): which of the two is "
            "meant is unclear. Push a folder with one of them"
        )
    if not has_model and not has_adapter:
        raise ValueError(
            f"{folder} has neither config.json nor adapter_config.json, so it is no checkpoint. Give the output_dir "
            "of a run, or a folder of `dlm-tune merge`"
        )
    check_weight_files(folder, "adapter_model" if has_adapter else "model")


def _shared_config(facts: CheckpointFacts) -> dict[str, Any]:
    config = dict(facts.config)
    if facts.is_adapter:
        if config.get("base_model_name_or_path") != facts.base_model:
            config |= {"base_model_name_or_path": facts.base_model, "revision": None}
    elif facts.auto_map is not None:
        config["auto_map"] = facts.auto_map
    else:
        config.pop("auto_map", None)
    return _without_paths(config)


def _without_paths(content: dict[str, Any]) -> dict[str, Any]:
    return {key: without_local_paths(value) if key in _PATH_KEYS else value for key, value in content.items()}


def _check_secrets(folder: Path, files: dict[str, Path | bytes], secrets: list[str]) -> None:
    for name, file in files.items():
        if name.endswith(".safetensors") or (isinstance(file, Path) and file.stat().st_size > _LARGEST_TEXT):
            continue
        content = file if isinstance(file, bytes) else file.read_bytes()
        if has_secret(content.decode("utf-8", errors="replace"), secrets):
            raise ValueError(
                f"{folder / name} holds what looks like an access token or another secret of this machine, and would "
                "be published. Remove it from the file (and revoke it if it was shared before); nothing was sent"
            )


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
