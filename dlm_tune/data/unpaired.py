"""Paired rows and text without prompts in one stream, so that fine-tuning keeps a true unconditional branch.

A row of unpaired text is shown to the model as sampling will show the unconditional branch: behind the tokens of some
row's prompt, which the noise of the step then masks (`mask_prompt`), as an answer of which every token is a target.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset, Sampler

from dlm_tune.data.rows import IGNORED_LABEL

_PAIRED, _UNPAIRED, _PROMPTS = range(3)


class UnpairedMixture(Dataset):
    """An endless stream of rows in which every window of n positions holds `fraction * n` unpaired rows, to one row.

    Position k is unpaired iff `floor((k + 1) f) > floor(k f)`, with exact fractions. Paired and unpaired rows are
    each taken in their own order, pass after pass, freshly permuted in each pass; the prompts that unpaired rows stand
    behind too. Everything is a function of the position, so that resuming and sharding need no state.

    Attributes:
        paired: Rows of `check_rows`, `{input_ids, labels, row_index}`.
        unpaired: Rows of `check_rows` in which every token is a target.
        fraction: Share of unpaired rows.
    """

    def __init__(
        self,
        paired: datasets.Dataset,
        unpaired: datasets.Dataset,
        *,
        fraction: float,
        seed: int,
        shuffle: bool = True,
        max_length: int | None = None,
    ) -> None:
        """Mix two data sets.

        Args:
            paired: Rows with prompts.
            unpaired: Rows of text.
            fraction: Share of unpaired rows, between 0 and 1.
            seed: Key of the permutations.
            shuffle: Whether rows are permuted, or taken in their order.
            max_length: Longest row; prompts lose their beginning where text leaves too little room.
        """
        self.paired, self.unpaired = paired, unpaired
        self.fraction, self.max_length = fraction, max_length
        self._share = Fraction(fraction).limit_denominator(10**9)
        self._first_unpaired_index = int(np.max(paired.with_format("numpy")["row_index"][:])) + 1
        self._seed, self._shuffle = seed, shuffle
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Positions of one pass over the paired rows."""
        return -(-len(self.paired) * self._share.denominator // (self._share.denominator - self._share.numerator))

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows at any positions of the stream; torch's DataLoader calls this."""
        return [
            self._unpaired_row(n) if is_unpaired else self._paired_row(n)
            for is_unpaired, n in map(self.place, positions)
        ]

    def place(self, position: int) -> tuple[bool, int]:
        """Return whether a position is unpaired, and how many positions of its kind precede it."""
        before, after = (k * self._share.numerator // self._share.denominator for k in (position, position + 1))
        return (True, before) if after > before else (False, position - before)

    def one_pass(self) -> datasets.Dataset:
        """Return `input_ids` and `labels` of the first pass over the paired rows, in memory."""
        columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
        for position in range(len(self)):
            row = self[position]
            for name, values in columns.items():
                values.append(np.asarray(row[name], dtype=np.int32))
        return datasets.Dataset(pa.table({name: pa.array(values) for name, values in columns.items()}))

    def _paired_row(self, number: int) -> dict[str, Any]:
        return {**self.paired[self._nth(_PAIRED, number, len(self.paired))], "is_unpaired": False}

    def _unpaired_row(self, number: int) -> dict[str, Any]:
        text = self.unpaired[self._nth(_UNPAIRED, number, len(self.unpaired))]["input_ids"]
        donor = self.paired[self._nth(_PROMPTS, number, len(self.paired))]
        prompt = donor["input_ids"][: _prompt_length(donor["labels"])]
        if self.max_length is not None:
            prompt = prompt[max(0, len(prompt) + len(text) - self.max_length) :]
        return {
            "input_ids": [*prompt, *text],
            "labels": [IGNORED_LABEL] * len(prompt) + list(text),
            # each occurrence has noise of its own
            "row_index": self._first_unpaired_index + number,
            "is_unpaired": True,
        }

    def _nth(self, stream: int, number: int, size: int) -> int:
        cycle, place = divmod(number, size)
        if not self._shuffle:
            return place
        if self._orders.get(stream, (-1,))[0] != cycle:
            self._orders[stream] = cycle, np.random.default_rng([self._seed, stream, cycle]).permutation(size)
        return int(self._orders[stream][1][place])


class StreamSampler(Sampler[int]):
    """The positions of one epoch of an `UnpairedMixture`: those that follow the previous epoch's."""

    def __init__(self, mixture: UnpairedMixture, epoch: Any) -> None:
        """Sample a mixture.

        Args:
            mixture: The stream.
            epoch: Called without arguments when an epoch begins, gives its number.
        """
        self.mixture, self.epoch = mixture, epoch

    def __len__(self) -> int:
        return len(self.mixture)

    def __iter__(self) -> Iterator[int]:
        start = self.epoch() * len(self.mixture)
        return iter(range(start, start + len(self.mixture)))


def answers_without_prompts(rows: datasets.Dataset) -> datasets.Dataset:
    """Return tokenised rows reduced to their targets: what a template or tokenizer put before the text is left out."""

    def keep_targets(row: dict[str, list[int]]) -> dict[str, list[int]]:
        targets = [label for label in row["labels"] if label != IGNORED_LABEL]
        return {"input_ids": targets, "labels": targets}

    return rows.map(keep_targets, remove_columns=[c for c in rows.column_names if c not in ("input_ids", "labels")])


def _prompt_length(labels: Sequence[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
