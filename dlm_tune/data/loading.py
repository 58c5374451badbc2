"""The data section of a recipe as data sets: sources, mixtures and the split into training and evaluation rows."""

import logging
from collections.abc import Sequence

import datasets
import numpy as np
from datasets import Dataset

from dlm_tune.data.arguments import DatasetArguments, DatasetEntry
from dlm_tune.data.formats import select_format
from dlm_tune.data.row_report import is_main_process
from dlm_tune.data.sources import choose_split, load_source

logger = logging.getLogger(__name__)


def load_datasets(
    arguments: DatasetArguments, seed: int, *, text_field: str = "text"
) -> tuple[Dataset, Dataset | None]:
    """Return the training rows and the evaluation rows (None where the section names none).

    Args:
        arguments: The data section.
        seed: Decides which rows `test_split_size` holds out and which rows `weight` repeats once more than others.
        text_field: The column of plain text (`dataset_text_field`).

    Raises:
        ValueError: If a source cannot be read, has no such split, has columns of no known format, or does not fit the
            other data sets of the mixture.
    """
    evaluation = None
    if arguments.datasets:
        parts = [_load_entry(position, entry, text_field) for position, entry in enumerate(arguments.datasets)]
        _check_same_features(parts, arguments.datasets)
    else:
        assert arguments.dataset_name is not None  # checked by DatasetArguments
        source = f"dataset_name={arguments.dataset_name!r}"
        splits = load_source(arguments.dataset_name, key="dataset_name", config=arguments.dataset_config)
        rows = choose_split(splits, arguments.dataset_train_split, key="dataset_train_split", source=source)
        parts = [select_format(rows, text_field=text_field, source=source)]
        test_split = arguments.dataset_test_split
        if arguments.eval_dataset_name is None and arguments.test_split_size is None:
            if test_split is None and "test" in splits and arguments.dataset_train_split.split("[")[0] != "test":
                test_split = "test"
            if test_split is not None:
                rows = choose_split(splits, test_split, key="dataset_test_split", source=source)
                evaluation = select_format(rows, text_field=text_field, source=source)
    if arguments.eval_dataset_name is not None:
        evaluation = _load_evaluation(arguments, text_field)
    train, held_out = _combine(parts, arguments, seed)
    return train, held_out if evaluation is None else evaluation


def load_unpaired(arguments: DatasetArguments, *, text_field: str = "text") -> Dataset | None:
    """Return the rows of `unpaired_dataset`, None where the section names none.

    Raises:
        ValueError: If it cannot be read, or holds anything but plain text.
    """
    if arguments.unpaired_dataset is None:
        return None
    source = f"unpaired_dataset={arguments.unpaired_dataset!r}"
    splits = load_source(arguments.unpaired_dataset, key="unpaired_dataset", config=arguments.unpaired_dataset_config)
    rows = choose_split(splits, arguments.unpaired_dataset_split, key="unpaired_dataset_split", source=source)
    rows = select_format(rows, text_field=text_field, source=source)
    if rows.column_names not in ([text_field], ["input_ids"]):
        raise ValueError(
            f"{source} has the columns {rows.column_names}: unpaired text has no prompts. Give a file with the column "
            f"{text_field!r} alone."
        )
    return rows


def _load_entry(position: int, entry: DatasetEntry, text_field: str) -> Dataset:
    key = f"datasets[{position}]"
    splits = load_source(
        entry.path, key=f"{key}.path", config=entry.name, data_dir=entry.data_dir, data_files=entry.data_files
    )
    source = f"{key} (path={entry.path!r})"
    rows = choose_split(splits, entry.split, key=f"{key}.split", source=source)
    if entry.columns is not None:
        missing = [column for column in entry.columns if column not in rows.column_names]
        if missing:
            raise ValueError(f"{source}: columns={entry.columns} names {missing}, but there are {rows.column_names}.")
        rows = rows.select_columns(entry.columns)
    return select_format(rows, text_field=text_field, source=source)


def _load_evaluation(arguments: DatasetArguments, text_field: str) -> Dataset:
    name = str(arguments.eval_dataset_name)
    source = f"eval_dataset_name={name!r}"
    splits = load_source(name, key="eval_dataset_name")
    split = arguments.dataset_test_split or ("test" if "test" in splits or len(splits) > 1 else next(iter(splits)))
    rows = choose_split(splits, split, key="dataset_test_split", source=source)
    return select_format(rows, text_field=text_field, source=source)


def _check_same_features(parts: Sequence[Dataset], entries: Sequence[DatasetEntry]) -> None:
    """Raise unless all data sets of a mixture have the same columns of the same types."""
    for position, part in enumerate(parts[1:], start=1):
        if part.column_names != parts[0].column_names:
            raise ValueError(
                f"datasets[{position}] (path={entries[position].path!r}) has the columns {part.column_names}, but "
                f"datasets[0] (path={entries[0].path!r}) has {parts[0].column_names}: the data sets of a mixture must "
                "share one format. Convert one of them."
            )
        for column in part.column_names:
            kinds = [_kind(dataset.features[column]) for dataset in (parts[0], part)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"datasets[{position}] (path={entries[position].path!r}) holds {kinds[1]} in column {column!r}, "
                    f"but datasets[0] (path={entries[0].path!r}) holds {kinds[0]}: a mixture must share "
                    "one format. Convert one of them."
                )


def _kind(feature: object) -> str:
    """Return what a column holds as far as the formats tell apart: text, a list, or a type's own name."""
    if isinstance(feature, (datasets.List, datasets.LargeList, list)):
        return "lists"
    if isinstance(feature, datasets.Value):
        return "text" if "string" in feature.dtype else feature.dtype
    return type(feature).__name__


def _combine(parts: Sequence[Dataset], arguments: DatasetArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Return training and held-out rows of a mixture (of one part, in the plain case).

    Rows are held out before any are repeated, so that a repeated row is never on both sides.
    """
    shares = [entry.fraction for entry in arguments.datasets]
    if shares and shares[0] is not None:
        sizes = _sizes_without_repetition([len(part) for part in parts], [share for share in shares if share])
        parts = [part.select(range(size)) for part, size in zip(parts, sizes, strict=True)]
    rows = parts[0] if len(parts) == 1 else _concatenate(parts)
    generator = np.random.default_rng(seed)
    chosen, held_out = np.arange(len(rows)), None
    if arguments.test_split_size is not None:
        num_held_out = _num_held_out(len(rows), arguments.test_split_size)
        order = generator.permutation(len(rows))
        chosen, held_out = np.sort(order[num_held_out:]), rows.select(np.sort(order[:num_held_out]))
    weights = [entry.weight for entry in arguments.datasets]
    if weights and weights[0] is not None:
        bounds = np.cumsum([len(part) for part in parts])[:-1]
        groups = np.split(chosen, np.searchsorted(chosen, bounds))
        chosen = np.concatenate(_repeat_to_weights(groups, [weight for weight in weights if weight], generator))
    elif held_out is None:
        return rows, None
    return rows.select(chosen), held_out


def _concatenate(parts: Sequence[Dataset]) -> Dataset:
    try:
        return datasets.concatenate_datasets([part.cast(parts[0].features) for part in parts])
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"the data sets of the mixture hold different types: {[dict(part.features) for part in parts]}. Convert "
            f"one of them ({error})."
        ) from error


def _num_held_out(num_rows: int, size: float) -> int:
    num_held_out = round(size * num_rows) if size < 1 else int(size)
    if not 0 < num_held_out < num_rows:
        raise ValueError(
            f"test_split_size={size} holds out {num_held_out} of {num_rows} rows: each side needs at least one row."
        )
    return num_held_out


def _sizes_without_repetition(sizes: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """Return how many of its first rows each data set gives, as `trl.get_dataset` does for `fraction`."""
    shares = [fraction / sum(fractions) for fraction in fractions]
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [round(share * total) for share in shares]


def _repeat_to_weights(
    groups: Sequence[np.ndarray], weights: Sequence[float], generator: np.random.Generator
) -> list[np.ndarray]:
    """Return the rows of each group, repeated so that the groups' sizes have the ratio of `weights`.

    The mixture is as small as it can be with every row in it at least once. Rows of one group are repeated equally
    often, but for a random remainder.
    """
    shares = [weight / sum(weights) for weight in weights]
    total = max(len(group) / share for group, share in zip(groups, shares, strict=True))
    repeated = []
    for group, share in zip(groups, shares, strict=True):
        size = round(share * total)
        if not len(group):
            raise ValueError("a data set of the mixture has no rows left to train on: lower `test_split_size`.")
        copies, remainder = divmod(size, len(group))
        extra = generator.choice(group, remainder, replace=False)
        repeated.append(np.concatenate([np.repeat(group, copies), np.sort(extra)]))
    if is_main_process():
        listing = ", ".join(
            f"{len(rows)} rows from {len(group)}" for rows, group in zip(repeated, groups, strict=True)
        )
        logger.info("Mixture by weight: %s.", listing)
    return repeated
