"""One source of rows: a local file, a directory of files, or a data set on the Hub.

What a name means is decided here, before anything is downloaded: a name that looks like a path is never looked up on
the Hub.
"""

import csv
import gzip
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets
from datasets import Dataset, DatasetDict, Features, Value
from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, get_data_patterns

from dlm_tune.data.arguments import did_you_mean

logger = logging.getLogger(__name__)

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAVED_MARKERS = ("dataset_dict.json", "state.json")  # written by save_to_disk


def file_format(path: Path) -> str | None:
    """Return the name of the loader for a file, by its ending (`.gz` ignored), or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes = suffixes[:-1]
    return FILE_FORMATS.get(suffixes[-1]) if suffixes else None


def load_source(
    name: str,
    *,
    key: str,
    config: str | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
) -> DatasetDict:
    """Return all splits of the data set `name`; a local file has the split `train`.

    Args:
        name: A local path, a Hub name, or a loader (`json`, `csv`, `parquet`, `text`) with `data_files`.
        key: The recipe's key that holds the name, for messages.
        config: Configuration of a Hub data set.
        data_dir: A directory of the Hub data set.
        data_files: Files for a loader, or of the Hub data set.

    Raises:
        ValueError: If there is no such file or data set, or if a file cannot be read; with the file and, for JSON
            lines, the line.
    """
    where = f"{key}={name!r}"
    path = Path(name).expanduser()
    if name in FILE_FORMATS.values() and (data_files is not None or not path.exists()):
        return _load_files(name, _as_split_files(data_files, where), where)
    if path.exists():
        _refuse_hub_keys(where, config=config, data_dir=data_dir, data_files=data_files)
        return _load_file(path, where) if path.is_file() else _load_directory(path, where)
    if _looks_like_a_path(name, path):
        raise ValueError(f"{where}: there is no such file or directory.{_nearest_file(path)}")
    return _load_from_hub(name, where, config=config, data_dir=data_dir, data_files=data_files)


def choose_split(splits: DatasetDict, split: str, *, key: str, source: str) -> Dataset:
    """Return one split, which may be sliced (`train[:100]`).

    Raises:
        ValueError: With the splits there are, if `split` is none of them.
    """
    match = re.fullmatch(r"([\w.-]+)(?:\[(-?\d*%?):(-?\d*%?)\])?", split)
    if match is None or match[1] not in splits:
        raise ValueError(
            f"{key}={split!r}: {source} has the splits {list(splits)}.{did_you_mean(split, splits)} A slice is "
            "written train[:1000] or train[10%:]."
        )
    rows = splits[match[1]]
    if match[2] is None:
        return rows
    start, stop = (_slice_bound(bound, len(rows)) for bound in match.groups()[1:])
    return rows.select(range(*slice(start, stop).indices(len(rows))))


def _slice_bound(bound: str, num_rows: int) -> int | None:
    if not bound:
        return None
    return round(int(bound[:-1]) / 100 * num_rows) if bound.endswith("%") else int(bound)


def _looks_like_a_path(name: str, path: Path) -> bool:
    return (
        file_format(path) is not None
        or path.suffix == ".gz"
        or name.startswith((".", "/", "~"))
        or name.endswith("/")
        or _HUB_NAME.fullmatch(name) is None
    )


def _nearest_file(path: Path) -> str:
    """Return a hint at the existing file nearest to `path`, in its own or the nearest existing directory."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    entries = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    hint = did_you_mean(path.name, entries)
    if folder != path.parent:
        return f" The nearest directory that exists is {str(folder)!r}."
    usable = [entry for entry in entries if file_format(Path(entry))]
    return hint or (
        f" {str(folder)!r} holds {', '.join(usable[:5])}." if usable else f" {str(folder)!r} has no data files."
    )


def _refuse_hub_keys(where: str, **keys: Any) -> None:
    given = {key: value for key, value in keys.items() if value is not None}
    if given:
        listing = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"{where} is a local path, where {listing} has no effect: remove it.")


def _as_split_files(data_files: Any, where: str) -> dict[str, list[str]]:
    if not data_files:
        raise ValueError(f"{where} is a file format: name the files in `data_files`, or give a path instead.")
    if not isinstance(data_files, dict):
        data_files = {"train": data_files}
    result = {split: [files] if isinstance(files, str) else list(files) for split, files in data_files.items()}
    for file in (file for files in result.values() for file in files):
        if not Path(file).expanduser().is_file():
            raise ValueError(f"{where}: data_files={file!r} does not exist.{_nearest_file(Path(file).expanduser())}")
    return result


def _load_file(path: Path, where: str) -> DatasetDict:
    loader = file_format(path)
    if loader is None:
        raise ValueError(
            f"{where}: the ending {path.suffix!r} is unknown. Readable: {', '.join(FILE_FORMATS)}, each also with .gz."
        )
    return _load_files(loader, {"train": [str(path)]}, where)


def _load_directory(path: Path, where: str) -> DatasetDict:
    if any((path / marker).exists() for marker in _SAVED_MARKERS):
        saved = datasets.load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    files = [file for file in sorted(path.rglob("*")) if _is_data_file(file, path)]
    loaders = sorted({str(file_format(file)) for file in files})
    if not files:
        raise ValueError(f"{where}: the directory has no data files ({', '.join(FILE_FORMATS)}, each also with .gz).")
    if len(loaders) > 1:
        raise ValueError(
            f"{where}: the directory mixes the formats {', '.join(loaders)}. Name one file, or list the files in "
            "`datasets`."
        )
    # which file belongs to which split is the rule of `datasets`: train, test, validation in the names
    found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    known = {str(file.resolve()): file for file in files}
    splits = {
        str(split): [str(known[real]) for file in split_files if (real := str(Path(file).resolve())) in known]
        for split, split_files in found.items()
    }
    splits = {split: split_files for split, split_files in splits.items() if split_files}
    used = {file for split_files in splits.values() for file in split_files}
    unused = [file.name for file in files if str(file) not in used]
    if unused:
        raise ValueError(
            f"{where}: some file names tell their split ({', '.join(splits)}), but {', '.join(unused[:5])} does not, "
            "and would be left out. Rename it (e.g. train-extra.jsonl), or list the files in `datasets`."
        )
    return _load_files(loaders[0], splits, where)


def _is_data_file(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    return file.is_file() and file_format(file) is not None and file.name not in FILES_TO_IGNORE and not hidden


def _load_files(loader: str, files: dict[str, list[str]], where: str) -> DatasetDict:
    """Read local files; a failure is explained by reading them again, line by line where there are lines."""
    paths = [Path(file).expanduser() for split_files in files.values() for file in split_files]
    for path in paths:
        with _open(path) as stream:
            if path.suffix != ".parquet" and not stream.read(1 << 16).strip():
                raise ValueError(f"{where}: the file {str(path)!r} is empty.")
    options: dict[str, Any] = {}
    if loader == "csv":
        options = _csv_options(paths, where)
    try:
        splits = datasets.load_dataset(loader, data_files=files, **options)
    except Exception as error:
        fault = _find_bad_line(paths) if loader == "json" else None
        cause = error.__cause__ or error
        reason = (
            fault or f"{', '.join(map(str, paths[:3]))} cannot be read as {loader} ({type(cause).__name__}: {cause})."
        )
        raise ValueError(f"{where}: {reason}") from error
    if loader == "text":
        splits = DatasetDict({split: _without_blank_lines(rows, where) for split, rows in splits.items()})
    return splits


def _open(path: Path) -> TextIO:
    # bytes that are no UTF-8 are for the loader to refuse; it skips a byte order mark too
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace")
    return path.open(encoding="utf-8-sig", errors="replace")


def _csv_options(paths: list[Path], where: str) -> dict[str, Any]:
    """Read every cell as text: a completion of 42 or NA is text, not a number or a missing value."""
    headers = []
    csv.field_size_limit(2**31 - 1)  # a cell may hold a document
    for path in paths:
        with _open(path) as stream:
            rows = csv.reader(stream)
            header, first_row = next(rows), next(rows, None)
        if first_row is None:
            raise ValueError(f"{where}: the file {str(path)!r} has a header but no rows.")
        if len(first_row) > len(header):  # pandas would take the first cell for the name of the row
            raise ValueError(
                f"{where}: {str(path)!r} has {len(header)} columns, but its first row has {len(first_row)} cells: "
                f"{first_row!r}. Quote cells with commas in them."
            )
        # a column without a name (`DataFrame.to_csv` writes its index so) gets the one that pandas gives it
        headers.append([name or f"Unnamed: {position}" for position, name in enumerate(header)])
    for path, header in zip(paths, headers, strict=True):
        if header != headers[0]:
            raise ValueError(
                f"{where}: {str(path)!r} has the columns {header}, but {str(paths[0])!r} has {headers[0]}."
            )
    return {"features": Features({name: Value("string") for name in headers[0]}), "keep_default_na": False}


def _find_bad_line(paths: list[Path]) -> str | None:
    """Return a description of the first line that is no JSON object, or None."""
    for path in paths:
        with _open(path) as stream:
            lines: Iterator[str] = stream
            if path.name.removesuffix(".gz").endswith(".json"):
                text = stream.read()
                if text.lstrip().startswith("["):
                    try:
                        json.loads(text)
                    except json.JSONDecodeError as error:
                        return f"{str(path)!r} is not valid JSON, line {error.lineno}: {error.msg}."
                    continue
                lines = iter(text.split("\n"))
            for number, line in enumerate(lines, start=1):
                try:
                    if line.strip() and not isinstance(json.loads(line), dict):
                        return f"{str(path)!r}, line {number} is not a JSON object: {line.strip()[:80]}"
                except json.JSONDecodeError as error:
                    return f"{str(path)!r}, line {number} is not valid JSON ({error.msg}): {line.strip()[:80]}"
    return None


def _without_blank_lines(rows: Dataset, where: str) -> Dataset:
    """Return the lines of a text file that hold text: blank ones separate."""
    kept = rows.filter(lambda batch: [bool(text.strip()) for text in batch["text"]], batched=True)
    if len(kept) != len(rows):
        logger.info("%s: skipped %d blank lines of %d.", where, len(rows) - len(kept), len(rows))
    return kept


def _load_from_hub(name: str, where: str, *, config: str | None, data_dir: str | None, data_files: Any) -> DatasetDict:
    try:
        return datasets.load_dataset(name, name=config, data_dir=data_dir, data_files=data_files)
    except datasets.exceptions.DatasetNotFoundError as error:
        reason = f"there is no such local path, and the Hub has no data set of this name that you may read ({error})."
        raise ValueError(f"{where}: {reason}{_nearest_file(Path(name))}") from error
    except (ConnectionError, OSError) as error:
        raise ValueError(
            f"{where}: there is no such local path, and the Hub cannot be reached ({error}). Name a local file, or "
            "download the data set while online."
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if "config" in str(error).lower():
            raise ValueError(f"{where} with the configuration {config!r}: {error} Set `dataset_config`.") from error
        raise ValueError(f"{where} cannot be loaded: {error} {error.__cause__ or ''}") from error
