"""Finding a checkpoint's files, and telling exactly what is wrong with them before anything is loaded."""

import difflib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

# No .py: remote code is not even downloaded. No subfolders: they hold other formats of the same weights.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def checkpoint_directory(path_or_repo: str | Path, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """Return the local directory of a checkpoint, downloading it where `path_or_repo` is a Hub name.

    Args:
        path_or_repo: directory or Hub name.
        revision: of the Hub repository.
        with_weights: False leaves the weights of a Hub repository where they are.

    Raises:
        ValueError: if there is no such directory and no such repository that can be reached.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if path.is_file():
        raise ValueError(f"model path {name!r} is a file; give the directory that holds config.json")
    looks_like_repo = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.parent.is_dir()
    if not looks_like_repo:
        raise ValueError(
            f"model path {name!r} does not exist{_nearest_directories(path)}. Give an existing directory or a Hub "
            "name of the form organisation/model"
        )
    try:
        ignored = ["*/*"] if with_weights else ["*/*", "*.safetensors"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=ignored))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"model {name!r} is not a local directory and could not be fetched from the Hub"
            f"{f' at revision {revision!r}' if revision else ''}: {reason}. Check the name, the connection "
            "(HF_HUB_OFFLINE must be unset to download) and, for gated models, `hf auth login`"
        ) from error


def _nearest_directories(path: Path) -> str:
    parent = path.absolute().parent
    if not parent.is_dir():
        while not parent.is_dir():
            path, parent = parent, parent.parent
    siblings = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.4)
    if near:
        return f"; the nearest directories in {parent} are {', '.join(near)}"
    return f"; {parent} holds {', '.join(siblings[:5])}" if siblings else f"; {parent} has no directories"


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise ValueError naming the file and the fault."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); copy it again from the source") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__} instead of an object; copy it again from the source"
        )
    return content


def base_record(path_or_repo: str | Path) -> dict[str, Any]:
    """What `training.json` says of a model's origin: of a local path the last part alone, and that it is local."""
    name = str(path_or_repo)
    is_local = Path(name).expanduser().exists() or name.count("/") != 1
    return {"base_model": name.rstrip("/").split("/")[-1] if is_local else name, "base_model_is_local": is_local}


def is_adapter_directory(directory: Path) -> bool:
    """Whether the directory holds an adapter and not a whole model."""
    return (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file()


def check_weight_files(directory: Path, stem: str = "model") -> None:
    """Raise ValueError unless the directory holds complete, readable safetensors files.

    Args:
        directory: the checkpoint.
        stem: "model", or "adapter_model" for an adapter.
    """
    index = directory / f"{stem}.safetensors.index.json"
    single = directory / f"{stem}.safetensors"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing:
            raise ValueError(
                f"{directory} lacks {len(missing)} of the {len(shards)} weight files that {index.name} lists: "
                f"{', '.join(missing[:5])}. Copy or download them again"
            )
        files = [directory / shard for shard in shards]
    elif single.is_file():
        files = [single]
    else:
        pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
        if pickles:
            raise ValueError(
                f"{directory} has its weights only as {', '.join(pickles[:3])}: pickle files can run code when "
                "loaded and are refused. Convert them to safetensors (load them in a trusted place and call "
                "save_pretrained), or take the safetensors revision of the checkpoint"
            )
        found = sorted(entry.name for entry in directory.iterdir())[:8]
        raise ValueError(
            f"{directory} has no {single.name} and no {index.name}; it holds {', '.join(found) or 'nothing'}. "
            "Give the directory of a saved checkpoint"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} ({file.stat().st_size} bytes) is truncated or corrupt: {error}. Copy or download it again"
            ) from error
