"""Several rows in one sequence: the plan, the packed data set, and the two layouts of a batch.

Noise, weights and statistics see one row per row (the row view, padded on the right); only the model's forward sees
packed sequences. `to_sequences` goes from the first layout to the second. Rows are numbered in the order in which they
lie in the sequences, so the marked tokens of a batch, read row by row, are the same list in both layouts.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


def plan_packing(lengths: np.ndarray | Sequence[int], max_length: int) -> list[np.ndarray]:
    """Distribute rows over sequences by best-fit decreasing (Johnson et al., SIAM J. Comput. 3(4), 1974).

    Rows come in the order of their length, longest first and equal ones by index; each goes to the sequence with the
    least room that still holds it, or opens a new one. At most 11/9 of the optimal number of sequences, plus 4, are
    used. The result depends on nothing but the arguments.

    Args:
        lengths: (rows,) tokens of each row, with the EOS it will get; see `DiffusionCollator.row_lengths`.
        max_length: tokens of a sequence.

    Returns:
        The rows of each sequence, ascending; each row in exactly one.

    Raises:
        ValueError: naming the rows that are longer than `max_length` or empty.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _check_lengths(lengths, max_length)
    order = np.argsort(-lengths, kind="stable")
    descending, counts = np.unique(-lengths, return_counts=True)
    # Sequences by their room. Equal rows go to a sequence together, since it stays the fullest that holds them.
    sequences_with: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # ascending, those that some sequence has
    chosen: list[int] = []
    taken: list[int] = []
    num_sequences = 0
    for length, count in zip((-descending).tolist(), counts.tolist(), strict=True):
        while count:
            smallest = bisect_left(rooms, length)
            if smallest == len(rooms):
                sequence, room = num_sequences, max_length
                num_sequences += 1
            else:
                room = rooms[smallest]
                sequence = sequences_with[room].pop()
                if not sequences_with[room]:
                    del rooms[smallest]
            fitting = min(count, room // length)
            chosen.append(sequence)
            taken.append(fitting)
            count -= fitting
            room -= fitting * length
            if not sequences_with[room]:
                insort(rooms, room)
            sequences_with[room].append(sequence)
    sequence_of = np.empty(len(lengths), dtype=np.int64)
    sequence_of[order] = np.repeat(chosen, taken)
    rows = np.argsort(sequence_of, kind="stable")
    ends = np.cumsum(np.bincount(sequence_of, minlength=num_sequences))
    return np.split(rows, ends[:-1]) if num_sequences else []


def _check_lengths(lengths: np.ndarray, max_length: int) -> None:
    faults = (
        (lengths > max_length, "longer than", "raise max_length, or set overlong_rows to drop or truncate"),
        (lengths < 1, "empty, so they have no place in", "leave them out, as check_rows does"),
    )
    messages = []
    for chosen, fault, remedy in faults:
        rows = np.flatnonzero(chosen)
        if len(rows):
            shown = ", ".join(f"{row} ({lengths[row]} tokens)" for row in rows[:5])
            more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
            messages.append(f"rows {shown}{more} are {fault} max_length={max_length}: {remedy}")
    if messages:
        raise ValueError("; ".join(messages) + ".")


class PackedRows(Dataset):
    """A data set of packed sequences: item i is `{"rows": [row, ...]}`, the rows of sequence i.

    Which rows share a sequence is fixed; the order of the sequences is the sampler's.

    Attributes:
        rows: The checked rows, `{input_ids, labels, row_index}`.
        plan: The rows of each sequence.
        max_rows: Rows of the sequence that has most.
        efficiency: Tokens over room: sum of lengths / (sequences times `max_length`).
    """

    def __init__(self, rows: datasets.Dataset, lengths: np.ndarray | Sequence[int], max_length: int) -> None:
        """Plan the packing.

        Args:
            rows: Rows of `check_rows`.
            lengths: (rows,) tokens of each, with the EOS that the collator adds: `collator.row_lengths(rows)`.
            max_length: Tokens of a sequence.

        Raises:
            ValueError: If a row is longer than `max_length`, or the lengths are not those of the rows.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if len(lengths) != len(rows) or not len(rows):
            raise ValueError(
                f"{len(lengths)} lengths were given for {len(rows)} rows: packing needs the length of each row, and a "
                "row at least; pass collator.row_lengths(rows)."
            )
        self.rows = rows
        # equal lengths meet in the order of their index, where repeated rows of a mixture would share a sequence
        order = np.random.default_rng(0).permutation(len(lengths))
        self.plan = [np.sort(order[part]) for part in plan_packing(lengths[order], max_length)]
        self.max_rows = max(map(len, self.plan))
        self.efficiency = float(lengths.sum()) / (len(self.plan) * max_length)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, list[dict[str, Any]]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, list[dict[str, Any]]]]:
        """Return several items with one read of the rows; torch's DataLoader calls this."""
        parts = [self.plan[index] for index in indices]
        rows = iter(self.rows.__getitems__(np.concatenate(parts).tolist()))
        return [{"rows": [next(rows) for _ in part]} for part in parts]


def to_sequences(values: Tensor, batch: Mapping[str, Any], fill_value: int | float | bool) -> Tensor:
    """Lay a tensor of the row view out as the model sees it; no synchronisation with the device.

    Args:
        values: (R, Lr).
        batch: A batch of `DiffusionCollator`.
        fill_value: What the padding of the sequences holds.

    Returns:
        (B, L); `values` itself where the batch is not packed.
    """
    if "packed_position" not in batch:
        return values
    num_sequences, length = batch["packed_shape"]
    # the last element takes the padding of the rows
    flat = values.new_full((num_sequences * length + 1,), fill_value)
    flat = flat.scatter(0, batch["packed_position"].flatten(), values.flatten())
    return flat[:-1].view(num_sequences, length)


def document_ids(batch: Mapping[str, Any]) -> Tensor:
    """Return (B, L) long: row r of the row view as r + 1, and 0 where nothing is attended.

    `attention_mask` decides, also where it has been shortened since collation.
    """
    attended = batch["attention_mask"].long()
    numbers = torch.arange(1, len(attended) + 1, device=attended.device)
    return to_sequences(attended * numbers[:, None], batch, 0)
