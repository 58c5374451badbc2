"""Rows to batches: padding, the end of the answer, and the marks that tell what the loss sees."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dlm_tune.data.arguments import EOS_POLICIES, check_choice

_IGNORED_LABEL = -100


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
        pad_to_multiple_of: The batch's length becomes a multiple of this, with padding.
        padding_side: Side of the padding.
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

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of `rows`, each `{input_ids, labels, row_index}`.

        Returns:
            `input_ids` (B, L) long; `attention_mask` (B, L) long, 1 on content and on added EOS; `target_mask` (B, L)
            bool; `row_index` (B,) long; `eos_padding_mask` (B, L) bool, the EOS that fills an answer after its end
            (for display, the model does not take it).

        Raises:
            ValueError: If the rows carry no `row_index`.
        """
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
        size = int(full_lengths.max())
        if self.pad_to_multiple_of is not None:
            size = -(-size // self.pad_to_multiple_of) * self.pad_to_multiple_of

        position = np.arange(size)[None]
        if self.padding_side == "left":
            position = position - (size - full_lengths[:, None])
        in_row = (position >= 0) & (position < lengths[:, None])
        in_eos = (position >= lengths[:, None]) & (position < full_lengths[:, None])
        ids = np.full(in_row.shape, self.pad_token_id, dtype=np.int64)
        ids[in_row] = input_ids
        ids[in_eos] = self.eos_token_id
        is_target = in_eos.copy()
        is_target[in_row] = labels != _IGNORED_LABEL
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy((in_row | in_eos).astype(np.int64)),
            "target_mask": torch.from_numpy(is_target),
            "row_index": torch.tensor([int(row["row_index"]) for row in rows]),
            "eos_padding_mask": torch.from_numpy(in_eos & (position >= (lengths + num_end)[:, None])),
        }

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
        is_target = labels != _IGNORED_LABEL
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
