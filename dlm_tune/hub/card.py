"""The model card: metadata for the Hub, and the facts without which a diffusion checkpoint cannot be used."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dlm_tune.hub.card_sections import (
    evaluation_section,
    loading_section,
    model_section,
    training_section,
    usage_section,
)
from dlm_tune.hub.facts import CheckpointFacts, read_facts
from dlm_tune.hub.privacy import is_hub_name, known_secrets, last_part, redact

# Cards with this line are written anew; a card without it is somebody's own text.
MARKER = "<!-- Made by dlm-tune from the files of this folder. Remove this line to keep your own edits. -->"
_TEMPLATES = (MARKER, "[More Information Needed]", "It has been trained using [TRL]")


def make_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    keep: str | Path | None = None,
    secrets: Sequence[str] = (),
) -> ModelCard:
    """Make the model card of a checkpoint or adapter out of the files beside it.

    Args:
        folder: of the checkpoint.
        repo_id: name on the Hub that the card's code loads; by default the folder's name.
        base_model: Hub name of the base, where the files name a local folder or nothing.
        license: identifier as the Hub has them, such as "apache-2.0"; by default what the base's card beside its
            local weights says, else the field is left out.
        keep: a README.md whose text is kept if a human wrote it, with metadata added to its own; by default the one
            in the folder.
        secrets: strings that must not appear, beside those of the environment.

    Raises:
        ValueError: the folder holds no checkpoint that can be described.
    """
    facts = read_facts(folder, base_model)
    metadata = _metadata(facts, license)
    written = hand_written(Path(keep) if keep is not None else Path(folder) / "README.md")
    if written is not None:
        own = written.data.to_dict()
        tags = list(dict.fromkeys([*(own.get("tags") or []), *(metadata.get("tags") or [])]))
        merged = ModelCardData(**{**metadata.to_dict(), **own, "tags": tags})
        return ModelCard(f"---\n{merged.to_yaml()}\n---\n{written.text}")
    name = repo_id or Path(folder).resolve().name
    sections = [
        f"# {last_part(name)}",
        MARKER,
        _summary(facts),
        usage_section(facts, name),
        model_section(facts),
        evaluation_section(facts),
        training_section(facts),
        loading_section(facts, name),
    ]
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(redact(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n", known_secrets(*secrets)))


def write_card(folder: str | Path, **options: Any) -> None:
    """Write the card of `make_card` into the folder as README.md."""
    make_card(folder, **options).save(Path(folder) / "README.md")


def hand_written(readme: Path) -> ModelCard | None:
    """The card in a file, unless it is a template of PEFT, TRL or transformers or was made here."""
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8")
    is_made = any(line in text for line in _TEMPLATES) or "generated_from_trainer" in text
    return None if is_made else ModelCard(text)


def license_of(readme: str | Path) -> str | None:
    """The licence in a card's metadata."""
    path = Path(readme)
    found = ModelCard(path.read_text(encoding="utf-8")).data.to_dict().get("license") if path.is_file() else None
    return str(found) if found else None


def hub_datasets(recipe: Any) -> list[str]:
    """Hub names of a recipe's training data; files of one's own are not named."""
    entries = [entry.get("path") for entry in recipe.get("datasets") or [] if isinstance(entry, dict)]
    names = [recipe.get("dataset_name"), *entries, recipe.get("unpaired_dataset")]
    return list(dict.fromkeys(str(name) for name in names if is_hub_name(name)))


def _metadata(facts: CheckpointFacts, license: str | None) -> ModelCardData:
    tags = ["dlm-tune", "diffusion-language-model", "masked-diffusion"]
    tags += [facts.model_type.lower()] if facts.model_type else []
    tags += ["lora"] if facts.is_adapter and facts.config.get("peft_type") == "LORA" else []
    base = None if facts.base_is_local else facts.base_model
    relation = "quantized" if facts.config.get("quantization_config") else "finetune"
    own_base = facts.config.get("base_model_name_or_path") if facts.is_adapter else facts.recipe.get(
        "model_name_or_path"
    )  # fmt: skip
    return ModelCardData(
        license=license or (license_of(Path(own_base).expanduser() / "README.md") if own_base else None),
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation=None if base is None else "adapter" if facts.is_adapter else relation,
        datasets=facts.results.get("hub_datasets", hub_datasets(facts.recipe)) or None,
        tags=tags,
    )


def _summary(facts: CheckpointFacts) -> str:
    kind = (
        "An adapter for a masked diffusion language model" if facts.is_adapter else "A masked diffusion language model"
    )
    base, converted = "", facts.training.get("converted_from")
    if facts.base_model:
        shown = (
            f"`{facts.base_model}` (not on the Hub)"
            if facts.base_is_local
            else f"[{facts.base_model}](https://hf.co/{facts.base_model})"
        )
        base = f", {'converted' if converted else 'trained'} from {shown}"
    made = f"Converted from {converted} with dlm-tune, without training." if converted else "Trained with dlm-tune."
    return (
        f"{kind}{base}. It denoises: all masked positions are predicted at once, from the tokens on both sides. {made}"
    )


def metadata_of(card: str) -> str:
    """The YAML head of a card's text, without its dashes."""
    found = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    return found[1] if found else ""
