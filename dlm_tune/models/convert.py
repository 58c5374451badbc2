"""A causal decoder becomes a masked-diffusion checkpoint: a mask token, and attention in both directions.

No weight changes but the rows of the mask token. Initialising a diffusion model so, with logits shifted by one, is due
to DiffuLLaMA (arXiv 2410.17891, section 3.2) and Dream (arXiv 2508.15487, section 3.1).
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from dlm_tune.models.checkpoint_files import (
    base_record,
    check_weight_files,
    checkpoint_directory,
    is_adapter_directory,
    read_json,
)
from dlm_tune.models.families import ModelFamily, end_of_turn_ids
from dlm_tune.models.loading import check_loading_report, load_config, read_config
from dlm_tune.models.merged_files import LICENCE_FILES, copy_files
from dlm_tune.models.output_directory import check_shard_size, new_directory
from dlm_tune.models.tokenizer import check_mask_token_alone, load_tokenizer, read_tokenizer

DEFAULT_MASK_TOKEN = "<|mask|>"
# Tables that grow do so to a multiple of this, which matrix units prefer.
_ROWS_MULTIPLE = 64
_CHUNK_ROWS = 8192
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What a conversion did.

    Attributes:
        directory: where the checkpoint is.
        model_type: of its config.json.
        num_parameters: tied weights counted once.
        dtype: of the weights.
        rows_before: rows of the embedding table of the source.
        rows: of the new one.
        mask_token: its text.
        mask_token_id: its row.
        mask_embedding: where that row comes from, in words.
        logits_shift: whether position i is predicted from position i - 1.
        num_bytes: size of all files.
    """

    directory: Path
    model_type: str
    num_parameters: int
    dtype: torch.dtype
    rows_before: int
    rows: int
    mask_token: str
    mask_token_id: int
    mask_embedding: str
    logits_shift: bool
    num_bytes: int


def convert_checkpoint(
    path_or_repo: str | Path,
    output_dir: str | Path,
    *,
    mask_token: str | None = None,
    mask_embedding: str = "mean",
    logits_shift: bool = True,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> ConvertedCheckpoint:
    """Write an autoregressive checkpoint as a diffusion checkpoint that `load_model` reads.

    The mask token takes a row that the tables have beyond the vocabulary; without one the tables grow, to a multiple
    of 64 rows. New rows, and the mask token's row of an untied LM head, are the mean of the vocabulary's V rows: k new
    rows raise the logarithm of the softmax's normaliser by at most log(1 + k / V) (Jensen; Hewitt 2021). All other
    weights stay as they are, to the bit. The weights are in memory once; the directory appears complete or not at all.

    Args:
        path_or_repo: directory or Hub name of a Llama, Mistral, Qwen2, Qwen3, ... checkpoint (see FAMILIES).
        output_dir: directory to write.
        mask_token: text of the mask token, an added token of the tokenizer or a new one; None takes the tokenizer's
            own mask token, else `<|mask|>`.
        mask_embedding: "mean" of the vocabulary's embedding rows, or the token whose row is copied. The mask token's
            own text keeps the row that it has.
        logits_shift: position i is predicted by the hidden state of position i - 1, for which the source was trained;
            False for a model that learns to predict position i in place.
        dtype: of the written weights; None keeps the files'.
        revision: of the Hub repository.
        max_shard_size: largest weights file.
        overwrite: replace a checkpoint in `output_dir`.

    Raises:
        ValueError: naming the setting at fault and the remedy: a checkpoint of another kind or one that is a diffusion
            model already, a mask token in use, an unknown token, an output directory that is not empty.
        OSError: the disk is full, or another fault of writing.
    """
    check_shard_size(max_shard_size)
    source = checkpoint_directory(path_or_repo, revision, with_weights=False)
    config, family = _causal_config(source)
    tokenizer = read_tokenizer(source)
    _check_fit(tokenizer, config, source)
    copied_id = _copied_id(tokenizer, mask_embedding)
    _set_mask_token(tokenizer, mask_token)
    check_mask_token_alone(tokenizer, source)
    config.mask_token_id, config.logits_shift, config.use_cache = tokenizer.mask_token_id, logits_shift, False
    with new_directory(output_dir, overwrite=overwrite, sources=[source]) as folder:
        source = checkpoint_directory(path_or_repo, revision)
        model = _load_weights(source, config, family, dtype)
        rows_before = model.get_input_embeddings().num_embeddings
        vocabulary = sorted(set(tokenizer.get_vocab().values()) - {config.mask_token_id})
        add_mask_row(model, config.mask_token_id, vocabulary, copied_id)
        model.generation_config = _token_ids(model.generation_config)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        write_tokenizer(tokenizer, folder)
        copy_files(source, LICENCE_FILES, folder)
        write_record(folder, path_or_repo, "a causal decoder")
        load_config(folder)
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return ConvertedCheckpoint(
        directory=Path(output_dir),
        model_type=family.model_type,
        num_parameters=model.num_parameters(),
        dtype=model.dtype,
        rows_before=rows_before,
        rows=model.get_input_embeddings().num_embeddings,
        mask_token=tokenizer.mask_token,
        mask_token_id=config.mask_token_id,
        mask_embedding="mean of the vocabulary's rows" if copied_id is None else f"row of {mask_embedding!r}",
        logits_shift=logits_shift,
        num_bytes=num_bytes,
    )


@torch.no_grad()
def add_mask_row(model: Any, mask_token_id: int, vocabulary: list[int], copied_id: int | None = None) -> None:
    """Give the mask token its rows in the embedding table and, where that is not tied, in the LM head.

    Args:
        model: the decoder, changed in place.
        mask_token_id: the row; tables that lack it grow to the next multiple of 64.
        vocabulary: ids whose rows are averaged, for the mask token and for rows that are new.
        copied_id: the mask token's embedding is this row instead of the mean.
    """
    embeddings = model.get_input_embeddings()
    rows_before = embeddings.num_embeddings
    if mask_token_id >= rows_before:
        embeddings = model.resize_token_embeddings(
            mask_token_id + 1, pad_to_multiple_of=_ROWS_MULTIPLE, mean_resizing=False
        )
    tables = [embeddings.weight]
    head = model.get_output_embeddings().weight
    if head is not embeddings.weight:
        tables.append(head)
    copied = None if copied_id is None else embeddings.weight[copied_id].clone()
    for table in tables:
        mean = _mean_row(table, vocabulary)
        table[rows_before:] = mean
        table[mask_token_id] = mean
    if copied is not None:
        embeddings.weight[mask_token_id] = copied


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Save a tokenizer beside its model's config.json, with padding token and chat template as `load_tokenizer`."""
    tokenizer.save_pretrained(directory)
    load_tokenizer(directory).save_pretrained(directory)


def write_record(directory: Path, path_or_repo: str | Path, converted_from: str) -> None:
    """Write `training.json`: of what the checkpoint was made, and that nothing was trained."""
    content = {**base_record(path_or_repo), "converted_from": converted_from}
    (directory / "training.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _causal_config(directory: Path) -> tuple[PreTrainedConfig, ModelFamily]:
    """Config and family of a checkpoint that is a causal decoder and nothing else."""
    if is_adapter_directory(directory):
        raise ValueError(f"{directory} is an adapter; merge it into its base model first, and convert the result")
    file = directory / "config.json"
    content = read_json(file) if file.is_file() else {}
    native = [name for name in ("llada", "Dream") if content.get("model_type") == name]
    if native or content.get("mask_token_id") is not None or content.get("is_causal") is False:
        facts = ("model_type", "mask_token_id", "is_causal")
        found = ", ".join(f"{name}={content[name]!r}" for name in facts if name in content)
        raise ValueError(
            f"{directory} is a diffusion checkpoint already ({found} in its config.json): there is nothing to "
            "convert, load_model reads it as it is"
        )
    if "quantization_config" in content:
        raise ValueError(
            f"the weights in {directory} are quantised (quantization_config in its config.json); convert the "
            "checkpoint they were made from, and quantise when loading (load_in_4bit: true)"
        )
    return read_config(directory)


def _check_fit(tokenizer: Any, config: PreTrainedConfig, directory: Path) -> None:
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {token!r} at id {largest} but the model has {config.vocab_size} "
            "embedding rows; take both from the same checkpoint, or resize the embeddings first"
        )


def _copied_id(tokenizer: Any, mask_embedding: str) -> int | None:
    """The token whose row becomes the mask token's, None for the mean."""
    if mask_embedding == "mean":
        return None
    vocabulary = tokenizer.get_vocab()
    if mask_embedding not in vocabulary:
        near = difflib.get_close_matches(mask_embedding, tokenizer.get_added_vocab(), n=3, cutoff=0.4)
        raise ValueError(
            f"mask_embedding={mask_embedding!r} is no token of the vocabulary; give 'mean' or a token"
            + (f", such as {', '.join(map(repr, near))}" if near else " as the tokenizer writes it")
        )
    return vocabulary[mask_embedding]


def _set_mask_token(tokenizer: Any, mask_token: str | None) -> None:
    """Make the text the tokenizer's mask token, adding it where the vocabulary lacks it."""
    own = tokenizer.mask_token
    if own is not None and mask_token not in (None, own):
        raise ValueError(
            f"mask_token={mask_token!r}: the tokenizer has the mask token {own!r} already; leave mask_token out"
        )
    text = mask_token or own or DEFAULT_MASK_TOKEN
    token_id = tokenizer.get_vocab().get(text)
    if token_id is not None:
        _check_unused(tokenizer, text, token_id)
    tokenizer.add_special_tokens({"mask_token": text})


def _check_unused(tokenizer: Any, text: str, token_id: int) -> None:
    roles = [role for role in _ROLES if getattr(tokenizer, role, None) == text]
    if token_id in end_of_turn_ids(tokenizer):
        roles.append("end of a chat turn")
    if text not in tokenizer.get_added_vocab():
        roles.append("ordinary token, which texts contain")
    elif text in str(tokenizer.chat_template or ""):
        roles.append("part of the chat template")
    if roles:
        raise ValueError(
            f"mask_token={text!r} is in use ({', '.join(roles)}), and a text that holds it would look masked; give a "
            f"text that is not in the vocabulary, such as {DEFAULT_MASK_TOKEN!r}, or a reserved token"
        )


def _load_weights(directory: Path, config: PreTrainedConfig, family: ModelFamily, dtype: torch.dtype | None) -> Any:
    check_weight_files(directory)
    config.dtype = None  # "auto" then means the files' own and not the config's, to which they would be rounded
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that they are reported below, by name and with both shapes
        output_loading_info=True,
    )
    check_loading_report(report, directory, family)
    return model


def _token_ids(generation_config: GenerationConfig) -> GenerationConfig:
    """Only the ids of a generation config: temperatures and lengths are those of left-to-right sampling."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(generation_config, name, None) for name in names})


def _mean_row(table: Tensor, vocabulary: list[int]) -> Tensor:
    total = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    for start in range(0, len(vocabulary), _CHUNK_ROWS):
        total += table[vocabulary[start : start + _CHUNK_ROWS]].double().sum(dim=0)
    return (total / len(vocabulary)).to(table.dtype)
