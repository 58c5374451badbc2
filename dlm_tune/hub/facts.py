"""What a folder says about the checkpoint in it: read from its files, nothing is guessed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from dlm_tune.hub.privacy import is_hub_name, last_part
from dlm_tune.hub.remote_code import remote_code_map
from dlm_tune.models.checkpoint_files import is_adapter_directory, read_json
from dlm_tune.models.families import FAMILIES
from dlm_tune.models.loading import load_config
from dlm_tune.models.tokenizer import tokenizer_mask_token_id

TRAINING_FILE = "training.json"  # of the trainer, beside the weights
RESULTS_FILE = "results.json"  # of `dlm-tune sft` and `pretrain`
EVALUATION_FILE = "evaluation.json"  # of `dlm-tune eval --output_file FOLDER/evaluation.json`
RECIPE_FILE = "recipe.yaml"


@dataclass
class CheckpointFacts:
    """Facts of a folder's checkpoint; what is not known is None or empty.

    Attributes:
        folder: where it lies.
        is_adapter: an adapter, or a whole model.
        base_model: what it was trained from: a Hub name, or the last part of a local path.
        base_is_local: nobody else can load the base by that name.
        model_type: family, a key of `FAMILIES`.
        mask_token_id: the mask token.
        mask_token: its text.
        logits_shift: whether position i is predicted at position i - 1.
        authors_layout: whether the weights have the names that the authors' code gives them.
        config: config.json, or adapter_config.json.
        training: training.json: settings, steps, tokens, hardware, versions.
        results: results.json: evaluations before and after a run of the command line.
        evaluation: evaluation.json: figures of `dlm-tune eval`.
        recipe: recipe.yaml.
    """

    folder: Path
    is_adapter: bool
    base_model: str | None = None
    base_is_local: bool = False
    model_type: str | None = None
    mask_token_id: int | None = None
    mask_token: str | None = None
    logits_shift: bool | None = None
    authors_layout: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the training, as the trainer resolved them."""
        return self.training.get("settings") or {}

    @property
    def auto_map(self) -> dict[str, str] | None:
        """The `auto_map` of the pushed config.json, None where no repository has code that reads these weights."""
        if self.is_adapter or not self.authors_layout:
            return None
        return remote_code_map(self.config, None if self.base_is_local else self.base_model)

    @property
    def family_facts(self) -> dict[str, Any]:
        """What training added to the model's config, wherever it is kept."""
        return (self.config.get("auto_mapping") or {}).get("dlm_tune") or {} if self.is_adapter else self.config


def read_facts(folder: str | Path, base_model: str | None = None) -> CheckpointFacts:
    """Read the facts of a checkpoint or adapter.

    Args:
        folder: a folder of `save_pretrained`, of a training run or of `dlm-tune merge`.
        base_model: Hub name of what it was trained from, where the files do not say it.

    Raises:
        ValueError: the folder holds neither, or no mask token can be found.
    """
    folder = Path(folder)
    is_adapter = is_adapter_directory(folder)
    facts = CheckpointFacts(folder, is_adapter)
    for name, file in (("training", TRAINING_FILE), ("results", RESULTS_FILE), ("evaluation", EVALUATION_FILE)):
        setattr(facts, name, read_json(folder / file) if (folder / file).is_file() else {})
    if (folder / RECIPE_FILE).is_file():
        facts.recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8")) or {}
    if is_adapter:
        facts.config = read_json(folder / "adapter_config.json")
    _set_base(facts, base_model)
    (_set_adapter_family if is_adapter else _set_model_family)(facts)
    if facts.mask_token_id is not None:
        facts.mask_token = _token_text(folder, facts.mask_token_id)
    return facts


def _set_base(facts: CheckpointFacts, given: str | None) -> None:
    training = facts.training
    named = facts.config.get("base_model_name_or_path") if facts.is_adapter else training.get("base_model")
    named = given or named or facts.recipe.get("model_name_or_path")
    if not named:
        return
    # a relative path looks like a name of the Hub wherever it does not exist
    was_local = last_part(str(named)) == training.get("base_model") and training.get("base_model_is_local")
    facts.base_is_local = not given and (bool(was_local) or not is_hub_name(named))
    facts.base_model = last_part(str(named)) if facts.base_is_local else str(named)


def _set_model_family(facts: CheckpointFacts) -> None:
    config, family = load_config(facts.folder)
    facts.config = read_json(facts.folder / "config.json")
    facts.model_type, facts.logits_shift = family.model_type, bool(config.logits_shift)
    facts.mask_token_id = config.mask_token_id
    # of the families, LLaDA alone has other names in the authors' code than in transformers
    facts.authors_layout = family.model_type != "llada" or _first_weight(facts.folder).startswith("model.transformer.")


def _first_weight(folder: Path) -> str:
    """Name of a weight of a checkpoint, "" where there is none yet."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return str(next(iter(read_json(index).get("weight_map", {})), ""))
    file = folder / "model.safetensors"
    if not file.is_file():
        return ""
    with safe_open(file, framework="pt") as opened:
        return str(next(iter(opened.keys()), ""))


def _set_adapter_family(facts: CheckpointFacts) -> None:
    known = facts.family_facts
    facts.model_type, facts.mask_token_id = known.get("model_type"), known.get("mask_token_id")
    facts.logits_shift = known.get("logits_shift")
    base = Path(str(facts.config.get("base_model_name_or_path") or "")).expanduser()
    if facts.model_type is None and (base / "config.json").is_file():
        config, family = load_config(base)
        facts.model_type, facts.mask_token_id = family.model_type, config.mask_token_id
        facts.logits_shift = bool(config.logits_shift)
    if facts.mask_token_id is None:
        family_of = FAMILIES.get(str(facts.model_type), FAMILIES["llada"])
        facts.mask_token_id = tokenizer_mask_token_id(facts.folder, family_of)
    if facts.mask_token_id is None:
        raise ValueError(
            f"{facts.folder} is an adapter, and neither its adapter_config.json nor a tokenizer in it says which "
            "token is the mask, without which nobody can use it. Save the tokenizer beside it: "
            f"load_tokenizer(BASE).save_pretrained({str(facts.folder)!r})"
        )


def _token_text(folder: Path, token_id: int) -> str | None:
    file = folder / "tokenizer_config.json"
    if file.is_file():
        token = read_json(file).get("mask_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            return str(token)
    file = folder / "tokenizer.json"
    added = read_json(file).get("added_tokens", []) if file.is_file() else []
    return next((entry["content"] for entry in added if entry.get("id") == token_id), None)
