"""One account of the rows that cannot be used, for the error message or the log."""

import logging
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
from datasets import Dataset

logger = logging.getLogger(__name__)

NUM_SHOWN = 5
_MAX_DETAIL = 120

Policy = Literal["error", "drop"]


def is_main_process() -> bool:
    """Return whether this process writes to the log (the launchers number processes in the environment)."""
    return int(os.environ.get("RANK", "0")) == 0


class RowReport:
    """Collects the bad rows of one data set; `finish` raises, or leaves them out and logs how many.

    It holds one bit per row and the few rows that are shown, whatever the size of the data set.
    """

    def __init__(self, name: str, num_rows: int) -> None:
        self.name = name
        self.keep = np.ones(num_rows, dtype=bool)
        self._counts: dict[str, int] = {}
        self._shown: list[tuple[int, str]] = []
        self._remedies: dict[str, None] = {}  # of the errors, in order and without repetition

    def add(
        self,
        rows: Sequence[int] | np.ndarray,
        reason: str,
        details: Sequence[str] = (),
        *,
        policy: Policy,
        remedy: str = "repair them, or leave them out with `invalid_rows: drop`",
    ) -> None:
        """Note that `rows` are bad for one `reason`; `details` belong to the first of them."""
        if not len(rows):
            return
        self.keep[rows] = False
        self._counts[reason] = self._counts.get(reason, 0) + len(rows)
        if policy == "error":
            self._remedies[remedy] = None
        shown = [(int(row), reason) for row in rows[:NUM_SHOWN]]
        for index, detail in enumerate(details[:NUM_SHOWN]):
            short = detail if len(detail) <= _MAX_DETAIL else detail[:_MAX_DETAIL] + "..."
            shown[index] = (shown[index][0], f"{reason}: {short}" if short else reason)
        self._shown = sorted(self._shown + shown)[:NUM_SHOWN]

    def finish(self, dataset: Dataset) -> Dataset:
        """Return `dataset` without the bad rows.

        Raises:
            ValueError: If a reason with the policy `error` applies to a row, or if no row is left.
        """
        if not len(dataset):
            raise ValueError(f"the {self.name} data set has no rows: check the file, the split and the filters.")
        num_bad = len(dataset) - int(self.keep.sum())
        if not num_bad:
            return dataset
        if self._remedies or num_bad == len(dataset):
            raise ValueError(self._message(num_bad, len(dataset)))
        if is_main_process():
            counts = "; ".join(f"{count} x {reason}" for reason, count in self._counts.items())
            logger.warning("Left out %d of %d rows of the %s data set: %s", num_bad, len(dataset), self.name, counts)
        return dataset.select(np.flatnonzero(self.keep))

    def _message(self, num_bad: int, num_rows: int) -> str:
        lines = [f"{num_bad} of {num_rows} rows of the {self.name} data set cannot be used:"]
        lines += [f"  {count} x {reason}" for reason, count in self._counts.items()]
        lines.append("The first of them (rows are counted from 0):")
        lines += [f"  row {row}: {what}" for row, what in self._shown]
        if num_bad == num_rows:
            lines.append("No row would be left, so leaving them out does not help: repair the data or the settings.")
        else:
            lines.append(f"What to do: {'; '.join(self._remedies)}.")
        return "\n".join(lines)
