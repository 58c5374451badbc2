"""The data section of a recipe.

The keys are TRL's where TRL has them (`trl.ScriptArguments`, `trl.DatasetMixtureConfig`); this module imports neither
torch nor datasets, so that a recipe is checked before anything heavy loads.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

# What the keys of a recipe may say
EOS_POLICIES = ("one", "pad_to_block", "pad_to_max", "none")
INVALID_ROWS = ("error", "drop")
OVERLONG_ROWS = ("error", "drop", "truncate", "split")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the choice nearest to `name`, or an empty string where none is near."""
    nearest = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the `choices` unless `value` is one of them."""
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ValueError(f"{key}={value!r} is unknown: choose {' or '.join(map(repr, choices))}.{hint}")


@dataclass
class DatasetEntry:
    """One data set of a mixture: TRL's `DatasetConfig` and, in addition, `weight`.

    Attributes:
        path: A local file or directory, a Hub name, or a file format (`json`, `csv`, `parquet`, `text`) together with
            `data_files`.
        name: The configuration of a Hub data set.
        data_dir: A directory inside the data set.
        data_files: The files to read, one or several.
        split: The split to read.
        columns: The columns to keep; all of the format's columns when unset.
        fraction: Share of the mixture, as in TRL: the mixture shrinks until no data set has to be repeated, so the
            others are cut to their first rows.
        weight: Share of the mixture: the mixture grows until no data set has to be cut, so the rows of the others are
            repeated. Each repetition is a row of its own and gets its own noise.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None
    weight: float | None = None


ENTRY_KEYS = tuple(entry_field.name for entry_field in fields(DatasetEntry))


@dataclass
class DatasetArguments:
    """Which data to train and evaluate on.

    Either `dataset_name` or `datasets` is given. Evaluation rows come from one of: `eval_dataset_name`,
    `test_split_size`, or the split `dataset_test_split` of `dataset_name`.

    Raises:
        ValueError: With every fault of the section at once.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Training data: a local file (.json, .jsonl, .csv, .parquet, .txt, each also .gz), a directory of "
            "such files, or the name of a Hub data set."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub data set `dataset_name`."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of `dataset_name` to train on."})
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: `test` where the data set has it, otherwise no evaluation."},
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Evaluation data: a local file, a directory or a Hub name of its own."}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Rows of the training data to hold out for evaluation: a fraction (0.05) or a number of rows "
            "(200). The choice is fixed by `seed`, and no row is in both."
        },
    )
    datasets: list[DatasetEntry] = field(
        default_factory=list,
        metadata={
            "help": "A mixture instead of `dataset_name`: a list of entries with the keys path, name, data_dir, "
            "data_files, split, columns, and fraction or weight."
        },
    )
    unpaired_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Text without prompts, mixed with the training rows as answers to hidden prompts: a file, a "
            "directory or a Hub name. It keeps the unconditional branch of guidance true."
        },
    )
    unpaired_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub data set `unpaired_dataset`."}
    )
    unpaired_dataset_split: str = field(default="train", metadata={"help": "Split of `unpaired_dataset`."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Not available yet: data sets are memory-mapped from disk instead."}
    )

    def __post_init__(self) -> None:
        faults: list[str] = []
        entries = [_to_entry(position, entry, faults) for position, entry in enumerate(self.datasets or [])]
        self.datasets = [entry for entry in entries if entry is not None]
        faults += self._source_faults(bool(entries)) + self._evaluation_faults(bool(entries))
        faults += _share_faults(self.datasets)
        if faults:
            listing = "".join(f"\n  {fault}" for fault in faults)
            raise ValueError(f"{len(faults)} problem{'s' * (len(faults) > 1)} in the data section:{listing}")

    def _source_faults(self, is_mixture: bool) -> list[str]:
        faults = []
        if not self.dataset_name and not is_mixture:
            faults.append(
                "no training data: set `dataset_name` (a file, a directory or a Hub name) or `datasets` (a mixture)."
            )
        if self.dataset_name and is_mixture:
            faults.append(
                f"dataset_name={self.dataset_name!r} and `datasets` are both set: keep one of them (a mixture may "
                "name the file as one of its entries)."
            )
        if is_mixture:
            defaults = {"dataset_config": None, "dataset_train_split": "train"}
            for key, default in defaults.items():
                if getattr(self, key) != default:
                    faults.append(
                        f"{key}={getattr(self, key)!r} has no effect on a mixture: set `name` or `split` in the "
                        "entries of `datasets`."
                    )
        if self.unpaired_dataset is None:
            for key, default in {"unpaired_dataset_config": None, "unpaired_dataset_split": "train"}.items():
                if getattr(self, key) != default:
                    faults.append(
                        f"{key}={getattr(self, key)!r} has no effect without `unpaired_dataset`: set it too."
                    )
        if self.dataset_streaming:
            faults.append(
                "dataset_streaming=True is not supported: noise and evaluation are keyed by the position of a row, "
                "which a stream does not have. Set dataset_streaming=False; data sets are memory-mapped from disk, "
                "so they may be larger than memory."
            )
        return faults

    def _evaluation_faults(self, is_mixture: bool) -> list[str]:
        faults = []
        size = self.test_split_size
        if size is not None:
            valid = not isinstance(size, bool) and isinstance(size, (int, float))
            if not valid or not (0 < size < 1 or (size >= 1 and size == int(size))):
                faults.append(
                    f"test_split_size={size!r}: give a fraction between 0 and 1 (0.05) or a number of rows (200)."
                )
            if self.eval_dataset_name:
                faults.append(
                    f"test_split_size={size!r} and eval_dataset_name={self.eval_dataset_name!r} both name evaluation "
                    "rows: keep one of them."
                )
            if self.dataset_test_split:
                faults.append(
                    f"test_split_size={size!r} and dataset_test_split={self.dataset_test_split!r} both name "
                    "evaluation rows: keep one of them."
                )
        if is_mixture and self.dataset_test_split and not self.eval_dataset_name:
            faults.append(
                f"dataset_test_split={self.dataset_test_split!r} has no effect on a mixture: set `eval_dataset_name` "
                "or `test_split_size`."
            )
        return faults


def _to_entry(position: int, entry: Any, faults: list[str]) -> DatasetEntry | None:
    """Return `entry` (a mapping, a JSON object as text, or a bare path) as a `DatasetEntry`; note its faults."""
    if isinstance(entry, DatasetEntry) and not entry.path.lstrip().startswith("{"):
        return entry
    where = f"datasets[{position}]"
    text = entry.path if isinstance(entry, DatasetEntry) else entry
    if isinstance(text, str):
        if not text.lstrip().startswith("{"):
            return DatasetEntry(path=text)
        try:
            entry = json.loads(text)
        except json.JSONDecodeError as error:
            faults.append(f"{where}={text!r} is not valid JSON: {error}.")
            return None
    if not isinstance(entry, dict):
        faults.append(f"{where}={entry!r} must be a mapping with the keys {', '.join(ENTRY_KEYS)}.")
        return None
    unknown = [key for key in entry if key not in ENTRY_KEYS]
    for key in unknown:
        nearest = did_you_mean(str(key), ENTRY_KEYS)
        faults.append(f"{where}: unknown key {key!r}.{nearest} The keys are {', '.join(ENTRY_KEYS)}.")
    if not isinstance(entry.get("path"), str) or not entry["path"]:
        faults.append(f"{where}: `path` is missing: a local file or directory, or a Hub name.")
        return None
    return None if unknown else DatasetEntry(**entry)


def _share_faults(entries: list[DatasetEntry]) -> list[str]:
    """Return what is wrong with the `fraction` and `weight` keys of a mixture."""
    faults = []
    for position, entry in enumerate(entries):
        for key in ("fraction", "weight"):
            value = getattr(entry, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
                faults.append(f"datasets[{position}]: {key}={value!r} must be a number above 0.")
    num_fractions = sum(entry.fraction is not None for entry in entries)
    num_weights = sum(entry.weight is not None for entry in entries)
    if num_fractions and num_weights:
        faults.append(
            "datasets: `fraction` (cuts the larger data sets) and `weight` (repeats the rows of the smaller ones) are "
            "both set: use one of them for all entries."
        )
    elif num_fractions not in (0, len(entries)) or num_weights not in (0, len(entries)):
        key = "fraction" if num_fractions else "weight"
        faults.append(f"datasets: `{key}` is set for some entries only: set it for all of them or for none.")
    return faults
