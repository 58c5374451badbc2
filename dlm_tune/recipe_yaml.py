"""YAML for recipes: line numbers, duplicate keys refused, and the scalars of YAML 1.2.

PyYAML follows YAML 1.1, where `1e-4` is a string and `no` is false: both are traps in recipes (`learning_rate: 1e-4`,
`eval_strategy: no`). Here a number is what JSON calls one, and only `true` and `false` are truth values.
"""

import re
from pathlib import Path
from typing import Any

import yaml


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars that refuses duplicate keys at every depth."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; a key that is written twice is an error."""
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            name, line = str(key_node.value), key_node.start_mark.line + 1
            if name in seen:
                problem = f"duplicate key '{name}', first written in line {seen[name]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[name] = line
        return super().construct_mapping(node, deep)


_SCALARS = [
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
        list("-+.0123456789"),
    ),
]
_REPLACED = (":bool", ":float", ":int", ":timestamp")


class RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes what either YAML 1.1 or a recipe would read as something else than text."""


# The table of resolvers is shared with the parent class until it is replaced.
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(_REPLACED)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in _SCALARS:
    RecipeLoader.add_implicit_resolver(_tag, _pattern, _first)
    RecipeDumper.add_implicit_resolver(_tag, _pattern, _first)


def parse_scalar(text: str) -> Any:
    """Read one value as a recipe would; text that is not YAML stays text."""
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.YAMLError:
        return text


def read_yaml(path: Path) -> tuple[list[tuple[str, Any, int]], list[str]]:
    """Read a flat recipe.

    Returns:
        `(key, value, line)` of every key in file order, and the faults: broken YAML, no mapping, duplicate keys.
    """
    try:
        loader = RecipeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except UnicodeDecodeError as error:
        return [], [f"{path}: is not a text file in UTF-8 ({error.reason} at byte {error.start})."]
    except yaml.YAMLError as error:
        return [], [_fault(path, error)]
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [], [f"{path}:{root.start_mark.line + 1}: a recipe is a mapping of `key: value` lines."]
    entries: list[tuple[str, Any, int]] = []
    faults: list[str] = []
    seen: dict[str, int] = {}
    for key_node, value_node in root.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        if name in seen:
            faults.append(
                f"{path}:{line}: duplicate key '{name}', first written in line {seen[name]}. Remove one of the two."
            )
            continue
        seen[name] = line
        try:
            entries.append((name, loader.construct_object(value_node, deep=True), line))
        except yaml.YAMLError as error:
            faults.append(_fault(path, error))
    return entries, faults


def _fault(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{path}:{mark.line + 1}" if mark else str(path)
    return f"{place}: {getattr(error, 'problem', None) or error}."


def dump_yaml(values: dict[str, Any], header: str = "") -> str:
    """Write values in their order, such that `read_yaml` gives them back."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.dump(values, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110)
