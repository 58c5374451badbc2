"""A directory that appears complete or not at all."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def new_directory(
    output_dir: str | Path, *, overwrite: bool = False, sources: Iterable[str | Path] = ()
) -> Iterator[Path]:
    """Yield an empty directory beside `output_dir`, which takes its place when the block ends without an error.

    After an error, or an interruption, what was written is removed and `output_dir` is as it was.

    Args:
        output_dir: where the files go.
        overwrite: replace a checkpoint that is there.
        sources: directories that are read, which `output_dir` must not replace.

    Raises:
        ValueError: `output_dir` is not empty and `overwrite` is False; it holds something else than a checkpoint, or
            a source.
        OSError: writing failed, for example because the disk is full.
    """
    target = Path(output_dir).expanduser().resolve()
    _check_target(target, overwrite, sources)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")  # one name: what a killed process left is removed
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _move(partial, target)
    except SafetensorError as error:
        raise OSError(f"writing {target} failed: {error}. Nothing was changed there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_shard_size(max_shard_size: str) -> None:
    """Raise ValueError unless this is a size as transformers reads it."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", str(max_shard_size)):
        raise ValueError(f"max_shard_size={max_shard_size!r} is no size; use a number and its unit, such as 5GB")


def _check_target(target: Path, overwrite: bool, sources: Iterable[str | Path]) -> None:
    for source in map(Path, sources):
        if source.resolve().is_relative_to(target):
            raise ValueError(f"output_dir={target} would replace {source}, from which is read; choose another one")
    if target.exists() and not target.is_dir():
        raise ValueError(f"output_dir={target} is a file; choose a directory")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"output_dir={target} is not empty; choose another one, or set overwrite to replace it")
    if not any((target / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"output_dir={target} holds no config.json, so it is no checkpoint and overwrite does not remove it; "
            "choose another one"
        )


def _move(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
