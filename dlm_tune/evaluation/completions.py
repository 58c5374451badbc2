"""Accuracy of generated answers on prompts with a known completion."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rapidfuzz.distance import Levenshtein
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dlm_tune.generation import (
    DiffusionGenerationConfig,
    config_for_tokenizer,
    decode_completion,
    generate,
    pad_prompts,
    tokenize_prompt,
)
from dlm_tune.generation.guidance import check_prompts, row_scales

ERROR_UNITS = ("character", "word")


@dataclass
class CompletionReport:
    """Result of `evaluate_completions`.

    Attributes:
        exact_match: fraction of rows whose generated text equals the reference.
        exact_match_standard_error: standard error of that mean over rows; NaN for a single row.
        error_rate: sum of edit distances over the sum of reference lengths, in characters or words; may exceed 1.
        num_rows: rows evaluated.
        num_forward_passes: calls of the model.
        num_row_passes: rows that went through the model; a row that is guided in a step counts twice.
        samples: `(prompt, reference, generated)` texts in the order of the rows. The prompt of a conversation is its
            last message.
    """

    exact_match: float
    exact_match_standard_error: float
    error_rate: float
    num_rows: int
    num_forward_passes: int
    num_row_passes: int
    samples: list[tuple[str, str, str]] = field(repr=False)


def evaluate_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    generation_config: DiffusionGenerationConfig | None = None,
    batch_size: int = 64,
    *,
    error_unit: str = "character",
    show_progress: bool = True,
) -> CompletionReport:
    """Generate a completion for every prompt and compare it with the reference.

    Prompts are tokenised as in training. A generated completion ends before its first EOS or end-of-turn token,
    special tokens are left out, and white space at both ends of it and of the reference is ignored. The noise of a row
    is keyed by its index, so the report does not depend on `batch_size`.

    Args:
        model: a model of `dlm_tune.load_model`, or a `PeftModel` of one.
        tokenizer: its tokenizer.
        dataset: rows with `prompt` and `completion`, both strings or both lists of messages.
        generation_config: options; the defaults if None.
        batch_size: rows generated together.
        error_unit: `character`, or `word` to count whitespace-separated words (phonemes, for instance).
        show_progress: show a progress bar with the time left.

    Raises:
        ValueError: no rows, a row that is not a prompt with a completion, or wrong arguments.
    """
    if error_unit not in ERROR_UNITS:
        raise ValueError(f"error_unit={error_unit!r} is unknown: choose 'character' or 'word'.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    rows = [_read_row(row, index, tokenizer.eos_token) for index, row in enumerate(dataset)]
    if not rows:
        raise ValueError("the data set has no rows: there is nothing to evaluate.")
    config = config_for_tokenizer(generation_config or DiffusionGenerationConfig(), tokenizer, model)
    generated, num_forward_passes, num_row_passes = _generate_texts(
        model, tokenizer, [row["prompt"] for row in rows], config, batch_size, show_progress
    )
    references = [row["reference"] for row in rows]
    shown = [prompt if isinstance(prompt := row["prompt"], str) else prompt[-1]["content"] for row in rows]
    matches = [text == reference for text, reference in zip(generated, references, strict=True)]
    exact_match = sum(matches) / len(rows)
    variance = exact_match * (1 - exact_match)
    return CompletionReport(
        exact_match=exact_match,
        exact_match_standard_error=math.sqrt(variance / (len(rows) - 1)) if len(rows) > 1 else math.nan,
        error_rate=edit_error_rate(generated, references, error_unit),
        num_rows=len(rows),
        num_forward_passes=num_forward_passes,
        num_row_passes=num_row_passes,
        samples=list(zip(shown, references, generated, strict=True)),
    )


def edit_error_rate(generated: list[str], references: list[str], unit: str = "character") -> float:
    """Sum of Levenshtein distances over the sum of reference lengths, in `unit`s; NaN if all references are empty."""
    split = list if unit == "character" else str.split
    pairs = [(split(text), split(reference)) for text, reference in zip(generated, references, strict=True)]
    length = sum(len(reference) for _, reference in pairs)
    return sum(Levenshtein.distance(*pair) for pair in pairs) / length if length else math.nan


def _generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    config: DiffusionGenerationConfig,
    batch_size: int,
    show_progress: bool,
) -> tuple[list[str], int, int]:
    """Generated texts in the order of `prompts`, forward passes and rows in them; the longest prompts run first."""
    token_ids = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    check_prompts(model.config, config, token_ids)
    order = sorted(range(len(prompts)), key=lambda index: -len(token_ids[index]))
    device = next(model.parameters()).device
    texts = [""] * len(prompts)
    num_forward_passes, num_row_passes = 0, 0
    with tqdm(total=len(prompts), desc="Generating", unit="row", disable=not show_progress) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = pad_prompts([token_ids[index] for index in batch], tokenizer.pad_token_id, device)
            scales = row_scales(config, len(batch))
            output = generate(model, *inputs, config, row_keys=torch.tensor(batch), guidance_scales=scales)
            num_forward_passes += output.num_forward_passes
            num_row_passes += output.num_row_passes
            new_tokens = output.sequences[:, inputs[0].shape[1] :].tolist()
            for index, row in zip(batch, new_tokens, strict=True):
                texts[index] = decode_completion(tokenizer, row, config.eos_token_ids or []).strip()
            progress.update(len(batch))
    return texts, num_forward_passes, num_row_passes


def _read_row(row: Mapping[str, Any], index: int, eos_token: str | None) -> dict[str, Any]:
    """`prompt` as given, and the `reference` text without an EOS at its end and white space around it."""
    for name in ("prompt", "completion"):
        value = row.get(name)
        if not isinstance(value, str) and not _is_messages(value):
            raise ValueError(
                f"row {index}: {name}={value!r} is neither a string nor a list of messages. Each row needs 'prompt' "
                "and 'completion'."
            )
    completion = row["completion"]
    if isinstance(completion, str) != isinstance(row["prompt"], str):
        raise ValueError(f"row {index}: 'prompt' and 'completion' must both be strings, or both be lists of messages.")
    text = completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
    return {"prompt": row["prompt"], "reference": text.removesuffix(eos_token or "").strip()}


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in value)
    )
