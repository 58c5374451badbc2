"""Rows to batches: padding, the end of the answer, and the marks that tell what the loss sees."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset

from dlm_tune.data.arguments import EOS_POLICIES, check_choice
from dlm_tune.data.rows import IGNORED_LABEL

_BATCH_SIZE = 10_000


@dataclass
class DiffusionCollator:
    """Pads rows to a batch and ends answers as `eos_policy` says.

    Padding is never attended and never a target. EOS tokens that a policy adds are both: the model learns them. They
    are added only to rows whose last token is a target, and never beyond `max_length`.

    An answer has ended when one of its last two tokens is EOS or an end-of-turn token (a chat template may write a
    line break after the end of turn). The policies:

    - `one`: one EOS at the end of an answer that has not ended.
    - `pad_to_block`: then EOS until the answer (the last run of targets) is a multiple of `block_length`.
    - `pad_to_max`: as `one`, then EOS until the longest row of the batch (LLaDA, arXiv 2502.09992, appendix B.1).
    - `none`: rows as they are.

    Attributes:
        pad_token_id: Token of padding.
        eos_token_id: Token that is added at the end of answers.
        eos_policy: One of the policies above.
        block_length: Block of `pad_to_block`, in tokens.
        pad_to_multiple_of: The length of what the model sees, padded rows or packed sequences, becomes a multiple of
            this, with padding.
        padding_side: Side of the padding; packed sequences are always padded on the right.
        end_of_turn_ids: Tokens that end an answer as EOS does.
        max_length: Longest row that added EOS may make; None for no limit.

    Raises:
        ValueError: If a setting is out of range or has no effect.
    """

    pad_token_id: int
    eos_token_id: int
    eos_policy: Literal["one", "pad_to_block", "pad_to_max", "none"] = "one"
    block_length: int | None = None
    pad_to_multiple_of: int | None = None
    padding_side: Literal["right", "left"] = "right"
    end_of_turn_ids: Collection[int] = ()
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_choice("eos_policy", self.eos_policy, EOS_POLICIES)
        check_choice("padding_side", self.padding_side, ("right", "left"))
        if (self.eos_policy == "pad_to_block") != (self.block_length is not None):
            raise ValueError(
                f"eos_policy={self.eos_policy!r} with block_length={self.block_length}: `pad_to_block` needs a "
                "block_length (the one used in generation, e.g. 32), and the other policies take none."
            )
        for key in ("block_length", "pad_to_multiple_of", "max_length"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value} must be at least 1.")
        for key in ("pad_token_id", "eos_token_id"):
            if getattr(self, key) is None:
                raise ValueError(f"{key} is missing: the tokenizer must define it.")
        self._terminal_ids = np.array(sorted({self.eos_token_id, *self.end_of_turn_ids}))

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of `items`: rows `{input_ids, labels, row_index}`, or `{"rows": [row, ...]}` to be packed.

        The batch is the row view, R rows that are padded to the longest; noise, weights and statistics use no other.
        Rows of packed items are numbered item by item and keep their order.

        Returns:
            `input_ids` (R, Lr) long; `attention_mask` (R, Lr) long, 1 on content and on added EOS; `target_mask`
            (R, Lr) bool; `row_index` (R,) long; `eos_padding_mask` (R, Lr) bool, the EOS that fills an answer after
            its end (for display, the model does not take it); of an `UnpairedMixture` also `is_unpaired` (R,) bool. Of
            packed items also `packed_position` (R, Lr) long,
            where `to_sequences` puts each token: sequence * L + column, and B * L for padding; and `packed_shape`,
            the integers (B, L), L being the fullest sequence (see `pad_to_multiple_of`).

        Raises:
            ValueError: If the rows carry no `row_index`, or settings do not go with packed items.
        """
        if "rows" not in items[0]:
            return self._pad(items, self.pad_to_multiple_of)[0]
        self._check_packable()
        rows = [row for item in items for row in item["rows"]]
        batch, lengths = self._pad(rows, None)
        # where each row starts in its sequence, and which sequence that is
        sequence_of = np.repeat(np.arange(len(items)), [len(item["rows"]) for item in items])
        tokens = np.bincount(sequence_of, weights=lengths, minlength=len(items)).astype(np.int64)
        starts = np.cumsum(lengths) - lengths - (np.cumsum(tokens) - tokens)[sequence_of]
        size = self._rounded(int(tokens.max()), self.pad_to_multiple_of)
        position = np.arange(batch["input_ids"].shape[1])
        places = (sequence_of * size + starts)[:, None] + position
        places[position >= lengths[:, None]] = len(items) * size
        batch["packed_position"] = torch.from_numpy(places)
        batch["packed_shape"] = (len(items), size)
        return batch

    def row_lengths(self, dataset: Dataset) -> np.ndarray:
        """Return the tokens (rows,) of each row of a checked data set, with the EOS that the collator will add.

        Raises:
            ValueError: Where the EOS depends on the other rows of a batch (`pad_to_max`).
        """
        self._check_packable()
        lengths = [np.zeros(0, dtype=np.int64)]
        for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=_BATCH_SIZE):
            plain = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
            input_ids, labels = (pc.list_flatten(table[column]).to_numpy() for column in ("input_ids", "labels"))
            num_end, num_filling = self._count_eos(input_ids, labels, plain)
            lengths.append(plain + num_end + num_filling)
        return np.concatenate(lengths)

    def _check_packable(self) -> None:
        faults = []
        if self.eos_policy == "pad_to_max":
            faults.append(
                "eos_policy='pad_to_max' makes the length of a row depend on the other rows of its batch, and packed "
                "sequences are planned before there are batches: choose 'one', 'none' or 'pad_to_block' (with the "
                "block_length of generation), or do not pack"
            )
        if self.padding_side == "left":
            faults.append("padding_side='left' has no meaning for packed sequences: choose 'right'")
        if faults:
            raise ValueError("; ".join(faults) + ".")

    @staticmethod
    def _rounded(size: int, multiple: int | None) -> int:
        return size if multiple is None else -(-size // multiple) * multiple

    def _pad(self, rows: Sequence[Mapping[str, Any]], multiple: int | None) -> tuple[dict[str, Any], np.ndarray]:
        """Return the row view and the length of each row with its EOS."""
        if "row_index" not in rows[0]:
            raise ValueError(
                f"rows have the columns {sorted(rows[0])} but no 'row_index', the key of their noise: pass the data "
                "set through dlm_tune.data.check_rows first."
            )
        lengths = np.array([len(row["input_ids"]) for row in rows])
        input_ids = np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows])
        labels = np.concatenate([np.asarray(row["labels"], dtype=np.int64) for row in rows])
        num_end, num_filling = self._count_eos(input_ids, labels, lengths)
        full_lengths = lengths + num_end + num_filling
        size = self._rounded(int(full_lengths.max()), multiple)
        position = np.arange(size)[None]
        if self.padding_side == "left":
            position = position - (size - full_lengths[:, None])
        in_row = (position >= 0) & (position < lengths[:, None])
        in_eos = (position >= lengths[:, None]) & (position < full_lengths[:, None])
        ids = np.full(in_row.shape, self.pad_token_id, dtype=np.int64)
        ids[in_row] = input_ids
        ids[in_eos] = self.eos_token_id
        is_target = in_eos.copy()
        is_target[in_row] = labels != IGNORED_LABEL
        batch = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy((in_row | in_eos).astype(np.int64)),
            "target_mask": torch.from_numpy(is_target),
            "row_index": torch.tensor([int(row["row_index"]) for row in rows]),
            "eos_padding_mask": torch.from_numpy(in_eos & (position >= (lengths + num_end)[:, None])),
        }
        if "is_unpaired" in rows[0]:
            batch["is_unpaired"] = torch.tensor([bool(row["is_unpaired"]) for row in rows])
        return batch, full_lengths

    def _count_eos(
        self, input_ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return, per row, how many EOS end the answer (0 or 1) and how many fill it up after its end.

        `input_ids` and `labels` are the rows one after the other, of the given `lengths`.
        """
        nothing = np.zeros_like(lengths)
        if self.eos_policy == "none":
            return nothing, nothing
        ends = np.cumsum(lengths)
        is_target = labels != IGNORED_LABEL
        is_end = np.isin(input_ids, self._terminal_ids) & is_target
        last, before_last = ends - 1, np.maximum(ends - 2, 0)
        is_open = (lengths > 0) & is_target[last]
        has_ended = is_end[last] | ((lengths > 1) & is_target[last] & is_end[before_last])
        limit = np.iinfo(np.int64).max if self.max_length is None else self.max_length
        room = np.maximum(limit - lengths, 0)
        num_end = np.where(is_open & ~has_ended, np.minimum(room, 1), 0)
        room = np.where(is_open, room - num_end, 0)
        if self.eos_policy == "one":
            return num_end, nothing
        if self.eos_policy == "pad_to_max":
            wanted = (lengths + num_end).max() - (lengths + num_end)
        else:
            assert self.block_length is not None  # checked in __post_init__
            # the last context token before the end of each row, as a position in the concatenation
            context = np.where(is_target, -1, np.arange(len(labels)))
            last_context = np.maximum(np.maximum.accumulate(context)[last], ends - lengths - 1)
            wanted = -(ends - 1 - last_context + num_end) % self.block_length
        return num_end, np.minimum(wanted, room)
