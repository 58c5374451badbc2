"""Checks on tokenised rows, and their final shape before batching.

A row is `input_ids` with `labels` of the same length: -100 where the token is context, the token itself where it is a
target of the loss. All work is done on Arrow batches with NumPy; nothing holds the whole data set in memory.
"""

import logging
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from dlm_tune.data.arguments import INVALID_ROWS, OVERLONG_ROWS, check_choice
from dlm_tune.data.row_report import NUM_SHOWN, RowReport, is_main_process

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
OverlongRows = Literal["error", "drop", "truncate", "split"]

_FINE, _EMPTY, _UNEQUAL, _TOKEN, _MASK, _LABEL, _NO_TARGET, _FIRST_ONLY, _PROMPT, _OVERLONG = range(10)
_BATCH_SIZE = 1000


def check_rows(
    dataset: Dataset,
    *,
    mask_token_id: int,
    max_length: int | None,
    invalid_rows: Literal["error", "drop"],
    overlong_rows: OverlongRows,
    first_target_position: int = 0,
    name: str,
    vocab_size: int | None = None,
) -> Dataset:
    """Return the rows that can be trained on, with the columns `input_ids`, `labels` and `row_index`.

    Args:
        dataset: Tokenised rows `{input_ids, labels}`.
        mask_token_id: The token that stands for noise; data that contains it is ambiguous.
        max_length: Longest row, in tokens; None for no limit.
        invalid_rows: Whether a row that cannot be trained on is an `error` or is left out (`drop`).
        overlong_rows: What happens to rows longer than `max_length`: `error`; `drop`; `truncate` cuts the end (of the
            answer: a row whose prompt alone fills `max_length` is invalid); `split` cuts rows in which every token is
            a target into windows of `max_length`, each a row of its own, so that each token stays a target once.
        first_target_position: 1 where the logits are shifted right, so that nothing predicts position 0: its label is
            removed; 0 otherwise.
        name: What to call the data set in messages, `train` or `eval`.
        vocab_size: Rows of the embedding table; token ids beyond it are reported when given.

    Returns:
        A data set whose `row_index` counts 0, 1, ...: the key of a row's noise.

    Raises:
        ValueError: With the first bad rows, the count of each reason and the remedies.
    """
    _check_settings(dataset, max_length, invalid_rows, overlong_rows, first_target_position)
    limits = _Limits(mask_token_id, max_length, first_target_position, vocab_size)
    codes, values, lengths = _scan(dataset, limits, overlong_rows)
    report = RowReport(name, len(dataset))
    for code in np.unique(codes[codes != _FINE]).tolist():
        _report(report, code, np.flatnonzero(codes == code), values, limits, invalid_rows, overlong_rows)
    dataset = report.finish(dataset)
    lengths = lengths[report.keep]
    num_overlong = 0 if max_length is None else int((lengths > max_length).sum())
    if num_overlong and is_main_process():
        verb = "Cut the end of" if overlong_rows == "truncate" else "Split into windows"
        total = len(lengths)
        logger.warning(
            "%s %d of %d rows of the %s data set: max_length=%s.", verb, num_overlong, total, name, max_length
        )
    return _reshape(dataset, lengths, max_length, overlong_rows, first_target_position, name)


def _check_settings(
    dataset: Dataset, max_length: int | None, invalid_rows: str, overlong_rows: str, first_target_position: int
) -> None:
    check_choice("invalid_rows", invalid_rows, INVALID_ROWS)
    check_choice("overlong_rows", overlong_rows, OVERLONG_ROWS)
    if max_length is not None and max_length <= first_target_position:
        raise ValueError(
            f"max_length={max_length} leaves no position for a target: use at least 2, or null for no limit."
        )
    for column in ("input_ids", "labels"):
        feature = dataset.features.get(column)
        inner = getattr(feature, "feature", None)
        if not isinstance(inner, Value) or not inner.dtype.startswith(("int", "uint")):
            raise ValueError(
                f"column {column!r} must hold a list of token ids (integers) per row, but it is {feature}: the data "
                f"set has the columns {dataset.column_names}."
            )


class _Limits:
    """What a row is measured against."""

    def __init__(
        self, mask_token_id: int, max_length: int | None, first_target_position: int, vocab_size: int | None
    ) -> None:
        self.mask_token_id = mask_token_id
        self.max_length = max_length
        self.first_target_position = first_target_position
        self.vocab_size = vocab_size


def _ragged(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated values of a list column and the length of each row (0 for null)."""
    lists = table[column]
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    flat = pc.fill_null(pc.list_flatten(lists), -1).to_numpy()
    return flat, lengths.astype(np.int64)


def _scan(dataset: Dataset, limits: _Limits, overlong_rows: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, per row, the code of its fault, a number that explains it, and its length."""
    codes = np.zeros(len(dataset), dtype=np.int8)
    values = np.zeros(len(dataset), dtype=np.int64)
    lengths = np.zeros(len(dataset), dtype=np.int64)
    start = 0
    for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=_BATCH_SIZE):
        rows = slice(start, start + len(table))
        lengths[rows] = _ragged(table, "input_ids")[1]
        label_lengths = _ragged(table, "labels")[1]
        unequal = lengths[rows] != label_lengths
        codes[rows][unequal] = _UNEQUAL
        values[rows][unequal] = label_lengths[unequal]
        found = _judge(table.filter(pa.array(~unequal)), limits, overlong_rows)
        codes[rows][~unequal], values[rows][~unequal] = found
        start += len(table)
    return codes, values, lengths


def _judge(table: pa.Table, limits: _Limits, overlong_rows: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the fault and its explaining number for each row; the first matching fault wins."""
    input_ids, lengths = _ragged(table, "input_ids")
    labels, _ = _ragged(table, "labels")
    num_rows = len(lengths)
    row_of = np.repeat(np.arange(num_rows), lengths)
    position = np.arange(len(input_ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    has_label = labels != IGNORED_LABEL
    is_target = has_label & (position >= limits.first_target_position)
    out_of_range = input_ids < 0
    if limits.vocab_size is not None:
        out_of_range |= input_ids >= limits.vocab_size

    def first(chosen: np.ndarray) -> np.ndarray:
        """Position of the first chosen token of each row, -1 where there is none."""
        where = np.flatnonzero(chosen)
        result = np.full(num_rows, -1, dtype=np.int64)
        result[row_of[where[::-1]]] = position[where[::-1]]  # the last assignment wins: the first token
        return result

    first_target = first(is_target)
    faults: list[tuple[int, np.ndarray, np.ndarray]] = [
        (_EMPTY, lengths == 0, lengths),
        *(
            (code, found >= 0, found)
            for code, found in (
                (_TOKEN, first(out_of_range)),
                (_MASK, first(input_ids == limits.mask_token_id)),
                (_LABEL, first(has_label & (labels != input_ids))),
            )
        ),
        (_FIRST_ONLY, (first_target < 0) & (first(has_label) >= 0), lengths),
        (_NO_TARGET, first_target < 0, lengths),
    ]
    if limits.max_length is not None:
        overlong = lengths > limits.max_length
        faults.append((_PROMPT, overlong & (first_target >= limits.max_length), first_target))
        if overlong_rows == "split":
            num_targets = np.bincount(row_of[is_target], minlength=num_rows)
            overlong &= num_targets < lengths - limits.first_target_position
        if overlong_rows != "truncate":
            faults.append((_OVERLONG, overlong, lengths))
    codes = np.select([mask for _, mask, _ in faults], [code for code, _, _ in faults], default=_FINE)
    return codes, np.select([mask for _, mask, _ in faults], [value for _, _, value in faults], default=0)


def _report(
    report: RowReport,
    code: int,
    rows: np.ndarray,
    values: np.ndarray,
    limits: _Limits,
    invalid_rows: Literal["error", "drop"],
    overlong_rows: str,
) -> None:
    """Add the `rows` of one fault to the report, in words."""
    vocabulary = "" if limits.vocab_size is None else f" (the vocabulary has {limits.vocab_size})"
    reasons = {
        _EMPTY: ("no tokens", "{} tokens"),
        _UNEQUAL: ("`labels` and `input_ids` differ in length", "{} labels"),
        _TOKEN: (f"a token id outside the vocabulary{vocabulary}", "at position {}"),
        _MASK: (f"the mask token (id {limits.mask_token_id}) is inside the data", "at position {}"),
        _LABEL: (
            "a label is neither -100 nor the token at its own position (labels are not shifted here)",
            "at position {}",
        ),
        _NO_TARGET: ("no target: every label is -100, so nothing would be learned", "{} tokens"),
        _FIRST_ONLY: ("the only target is position 0, which has no predictor (logits are shifted right)", "{} tokens"),
        _PROMPT: (
            f"the prompt alone fills max_length={limits.max_length}, so no target would be left",
            "the prompt has {} tokens",
        ),
        _OVERLONG: (f"longer than max_length={limits.max_length}", "{} tokens"),
    }
    reason, detail = reasons[code]
    details = [detail.format(value) for value in values[rows[:NUM_SHOWN]]]
    longer = "raise `max_length`"
    if code == _OVERLONG and overlong_rows != "split":
        remedy = f"{longer}, or set `overlong_rows` to `drop`, `truncate` (cuts the end) or `split` (plain text only)"
        report.add(rows, reason, details, policy="drop" if overlong_rows == "drop" else "error", remedy=remedy)
    elif code == _OVERLONG:
        reason += " and not all targets, so it cannot be split into windows"
        remedy = f"{longer}, set `overlong_rows` to `truncate` or `drop`, or leave these out with `invalid_rows: drop`"
        report.add(rows, reason, details, policy=invalid_rows, remedy=remedy)
    elif code == _PROMPT:
        remedy = f"{longer}, shorten the prompts, or leave them out with `invalid_rows: drop`"
        policy: Literal["error", "drop"] = "drop" if overlong_rows == "drop" else invalid_rows
        report.add(rows, reason, details, policy=policy, remedy=remedy)
    else:
        report.add(rows, reason, details, policy=invalid_rows)


def _reshape(
    dataset: Dataset,
    lengths: np.ndarray,
    max_length: int | None,
    overlong_rows: str,
    first_target_position: int,
    name: str,
) -> Dataset:
    """Return the rows cut or split as decided, with `row_index`, in one pass over the data."""
    step = None
    first_window = None
    if max_length is not None and overlong_rows == "split" and (lengths > max_length).any():
        # where position 0 of a window cannot be a target, windows overlap by one token: it is context there
        step = max_length - first_target_position
        num_windows = _num_windows(lengths, step, first_target_position)
        first_window = np.cumsum(num_windows) - num_windows
    features = Features({column: List(dataset.features[column].feature) for column in ("input_ids", "labels")})
    features["row_index"] = Value("int64")
    settings: dict[str, Any] = {
        "max_length": max_length,
        "step": step,
        "first_window": first_window,
        "first_target_position": first_target_position,
    }
    result = dataset.with_format("arrow").map(
        _reshape_batch,
        batched=True,
        batch_size=_BATCH_SIZE,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=features,
        fn_kwargs=settings,
        desc=f"Numbering the rows of the {name} data set",
    )
    return result.with_format(None)


def _num_windows(lengths: np.ndarray, step: int, overlap: int) -> np.ndarray:
    return np.maximum(1, -(-(lengths - overlap) // step))


def _reshape_batch(
    table: pa.Table,
    indices: list[int],
    *,
    max_length: int | None,
    step: int | None,
    first_window: np.ndarray | None,
    first_target_position: int,
) -> pa.Table:
    """Return the windows of the rows of `table`; without `step`, one window a row."""
    input_ids, lengths = _ragged(table, "input_ids")
    labels, _ = _ragged(table, "labels")
    numbers = np.asarray(indices, dtype=np.int64)
    num_windows = np.ones_like(lengths)
    if step is not None:
        num_windows = _num_windows(lengths, step, first_target_position)
    row_of = np.repeat(np.arange(len(lengths)), num_windows)
    window = np.arange(len(row_of)) - np.repeat(np.cumsum(num_windows) - num_windows, num_windows)
    shift = window * (step or 0)
    sizes = lengths[row_of] - shift
    if max_length is not None:
        sizes = np.minimum(sizes, max_length)
    row_starts = np.cumsum(lengths) - lengths
    ends = np.cumsum(sizes)
    chosen = np.arange(sizes.sum()) + np.repeat(row_starts[row_of] + shift - (ends - sizes), sizes)
    labels = labels[chosen]
    if first_target_position:
        labels[(ends - sizes)[sizes > 0]] = IGNORED_LABEL
    offsets = pa.array(np.concatenate([[0], ends]), type=pa.int32())
    row_index = numbers[row_of] if first_window is None else first_window[numbers][row_of] + window
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(input_ids[chosen])),
            "labels": pa.ListArray.from_arrays(offsets, pa.array(labels)),
            "row_index": pa.array(row_index),
        }
    )
