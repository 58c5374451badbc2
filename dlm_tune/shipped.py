"""Files that come with the package: recipes, accelerate configurations and the quickstart's checkpoint.

In a source checkout they lie beside the package; in an installed wheel, in `dlm_tune/share`.
"""

from difflib import get_close_matches
from pathlib import Path

SHIPPED_FOLDERS = ("recipes", "accelerate_configs", "models")

_PACKAGE = Path(__file__).resolve().parent


def shipped_root() -> Path:
    """Folder that holds `recipes`, `accelerate_configs` and `models`.

    Raises:
        FileNotFoundError: neither an installed package's `share` folder nor a source checkout is there.
    """
    for root in (_PACKAGE / "share", _PACKAGE.parent):
        if (root / "recipes").is_dir():
            return root
    raise FileNotFoundError(
        f"The recipes that come with dlm-tune are neither in {_PACKAGE / 'share'} nor beside {_PACKAGE}: "
        "reinstall the package."
    )


def shipped_names(folder: str) -> list[str]:
    """Names, without `.yaml`, of the YAML files in a shipped folder, e.g. `llada-8b/sft/lora`."""
    root = shipped_root() / folder
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_yaml(name: str, folder: str) -> Path:
    """Resolve a path, or a shipped name with or without `.yaml`.

    Raises:
        ValueError: no such file; the message lists the nearest shipped names.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    names = shipped_names(folder)
    shortened = name.removeprefix(f"{folder}/").removesuffix(".yaml").removesuffix(".yml")
    if shortened in names:
        return shipped_root() / folder / f"{shortened}.yaml"
    # A part of a name (`lora`) is nearest to all names that hold it
    near = [known for known in names if shortened in known] or get_close_matches(shortened, names, n=3, cutoff=0.5)
    listed = f"Nearest: {', '.join(near)}" if near else f"Available: {', '.join(names)}"
    raise ValueError(
        f"'{name}' is neither a file (from {Path.cwd()}) nor one of the shipped {folder.replace('_', ' ')}. {listed}."
    )


def resolve_path(value: str) -> str:
    """Resolve a relative path against the current directory first, then against the shipped files.

    Returns:
        The path that exists, or `value` unchanged, which is then a name on the Hub.
    """
    if Path(value).expanduser().exists():
        return str(Path(value).expanduser())
    shipped = shipped_root() / value
    return str(shipped) if shipped.exists() else value
