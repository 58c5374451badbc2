"""Tokenizers of diffusion language models: mask, end and padding tokens and a chat template, always set."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Tokenizer

from dlm_tune.models.checkpoint_files import checkpoint_directory, is_adapter_directory, read_json
from dlm_tune.models.families import FAMILIES, ModelFamily, family_chat_template

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
# Published tokenizers that come as remote code and are copies of a class of transformers.
_NATIVE_CLASSES = {"DreamTokenizer": Qwen2Tokenizer}


def load_tokenizer(
    path_or_repo: str | Path, *, revision: str | None = None, model_config: PreTrainedConfig | None = None
) -> Any:
    """Load a checkpoint's tokenizer with mask, EOS and padding token and a chat template.

    The mask token comes from the tokenizer, else from `mask_token_id` of the model's config, else from the family. A
    tokenizer without a chat template gets the family's, and so does one whose template cannot leave the conversation
    closed (LLaDA's published template appends the assistant's header whether asked or not).

    Args:
        path_or_repo: directory or Hub name of a model, or of an adapter (its base's tokenizer is the fallback).
        revision: of the Hub repository.
        model_config: the loaded model's config; by default the config.json beside the tokenizer is consulted.

    Raises:
        ValueError: for a missing or contradictory mask token, and for a vocabulary larger than the model's.
    """
    directory = checkpoint_directory(path_or_repo, revision)
    if is_adapter_directory(directory):
        settings = read_json(directory / "adapter_config.json")
        base, base_revision = str(settings.get("base_model_name_or_path") or ""), settings.get("revision")
        if not has_tokenizer_files(directory):
            if not base:
                raise ValueError(
                    f"{directory} is an adapter without a tokenizer, and its adapter_config.json names no "
                    "base_model_name_or_path to take one from; give the base model's directory"
                )
            return load_tokenizer(base, revision=base_revision, model_config=model_config)
        if model_config is None and base:
            model_config = _config_of(checkpoint_directory(base, base_revision))
    if model_config is None:
        model_config = _config_of(directory)
    family = FAMILIES.get(getattr(model_config, "model_type", ""))
    tokenizer = read_tokenizer(directory)
    _set_mask_token(tokenizer, model_config, family, directory)
    _set_end_and_padding(tokenizer, model_config, family, directory)
    _check_vocabulary(tokenizer, model_config, directory)
    if family is not None and (tokenizer.chat_template is None or _always_opens_assistant_turn(tokenizer)):
        vocabulary = tokenizer.get_vocab()
        end = family.end_of_turn_token if family.end_of_turn_token in vocabulary else tokenizer.eos_token
        tokenizer.chat_template = family_chat_template(family, end)
    return tokenizer


def has_tokenizer_files(directory: Path) -> bool:
    """Whether a tokenizer can be read from the directory."""
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def embedding_rows(config: Any) -> int:
    """Return the number of rows of the model's embedding table."""
    return getattr(config, "embedding_size", None) or config.vocab_size


def tokenizer_mask_token_id(directory: Path, family: ModelFamily) -> int | None:
    """Return the mask token's id according to the tokenizer files in a checkpoint directory, None if they lack it."""
    if not has_tokenizer_files(directory):
        return None
    tokenizer = read_tokenizer(directory)
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    return tokenizer.get_vocab().get(family.mask_token) if family.mask_token else None


def _config_of(directory: Path) -> PreTrainedConfig | None:
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        return None
    if read_json(directory / "config.json").get("model_type") not in FAMILIES:
        return None
    return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def read_tokenizer(directory: Path) -> Any:
    """Return the tokenizer of a checkpoint directory as its files say, without running remote code.

    Raises:
        ValueError: there is none, or only remote code could read it.
    """
    if not has_tokenizer_files(directory):
        raise ValueError(
            f"{directory} has no tokenizer ({', '.join(_TOKENIZER_FILES)} are all missing); copy the tokenizer files "
            "of the original checkpoint into it"
        )
    file = directory / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    name = settings.get("tokenizer_class", "")
    if name in _NATIVE_CLASSES:
        return _NATIVE_CLASSES[name].from_pretrained(directory)
    if "auto_map" in settings:
        if not (directory / "tokenizer.json").is_file():
            raise ValueError(
                f"tokenizer_class={name!r} in {file} is remote code, which is never executed, and there is no "
                "tokenizer.json; save the tokenizer as tokenizer.json with `tokenizers` first"
            )
        return PreTrainedTokenizerFast.from_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _set_mask_token(
    tokenizer: Any, config: PreTrainedConfig | None, family: ModelFamily | None, directory: Path
) -> None:
    wanted = getattr(config, "mask_token_id", None)
    if tokenizer.mask_token_id is None:
        token = None
        if wanted is not None:
            token = tokenizer.convert_ids_to_tokens(wanted) if wanted < len(tokenizer) else None
            if token is None and wanted == len(tokenizer):
                token = "<|mask|>"  # the model has a row for it, right behind the vocabulary
        elif family is not None and family.mask_token in tokenizer.get_vocab():
            token = family.mask_token
        if token is None:
            raise ValueError(
                f"the tokenizer in {directory} has no mask token"
                + (f", and mask_token_id={wanted} of the model is not in its vocabulary" if wanted is not None else "")
                + "; set mask_token in tokenizer_config.json, or mask_token_id in the model's config.json"
            )
        tokenizer.add_special_tokens({"mask_token": token})
    if wanted is not None and tokenizer.mask_token_id != wanted:
        raise ValueError(
            f"the tokenizer in {directory} says mask_token={tokenizer.mask_token!r} (id {tokenizer.mask_token_id}) "
            f"but the model says mask_token_id={wanted}; correct the wrong one, or take both from the same checkpoint"
        )
    check_mask_token_alone(tokenizer, directory)


def check_mask_token_alone(tokenizer: Any, directory: Path) -> None:
    """Raise ValueError where another token has the mask token's id: where ids have gaps, added ones can coincide."""
    mask_token, mask_token_id = tokenizer.mask_token, tokenizer.mask_token_id
    others = [token for token, number in tokenizer.get_vocab().items() if number == mask_token_id]
    if others != [mask_token]:
        raise ValueError(
            f"the tokenizer in {directory} gives the id {mask_token_id} of its mask token {mask_token!r} to "
            f"{', '.join(repr(token) for token in others if token != mask_token)} too, so that texts with it would "
            "look masked: the ids of its vocabulary have gaps. Set mask_token to a token it has and no text contains"
        )


def _set_end_and_padding(
    tokenizer: Any, config: PreTrainedConfig | None, family: ModelFamily | None, directory: Path
) -> None:
    if tokenizer.eos_token_id is None:
        eos_id = getattr(config, "eos_token_id", None)
        eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
        if eos_id is not None and eos_id < len(tokenizer):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_id)
        elif family is not None and family.eos_token in tokenizer.get_vocab():
            tokenizer.eos_token = family.eos_token
        else:
            raise ValueError(
                f"the tokenizer in {directory} has no EOS token, so texts could not end; set eos_token in "
                "tokenizer_config.json, or eos_token_id in the model's config.json"
            )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.mask_token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        raise ValueError(
            f"the tokenizer in {directory} uses {tokenizer.mask_token!r} both as mask token and as padding or EOS; "
            "set pad_token and eos_token in tokenizer_config.json to other tokens"
        )


def _check_vocabulary(tokenizer: Any, config: PreTrainedConfig | None, directory: Path) -> None:
    if config is None:
        return
    rows, largest = embedding_rows(config), max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"the tokenizer in {directory} has ids up to {largest} but the model has {rows} embedding rows; use the "
            "model's own tokenizer, or resize the embeddings with model.resize_token_embeddings"
        )


def _always_opens_assistant_turn(tokenizer: Any) -> bool:
    """Whether a finished conversation is rendered with an assistant header behind it."""
    answer = "the answer"
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except (TemplateError, ValueError, TypeError):
        return False
    return "assistant" in text.rpartition(answer)[2]
