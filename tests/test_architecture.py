"""The house rules that can be read off the source: arrows between packages, sizes, docstrings, a light import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlm_tune"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # docstring not counted

# What each floor may import of the ones below it. Everything not named here (cli, commands, recipe, ...) is the roof:
# it may import all floors, and no floor imports it.
FLOORS = {
    "diffusion": set(),
    "models": {"diffusion"},
    "data": {"diffusion"},
    "generation": {"diffusion"},
    "hub": {"diffusion", "models"},
    "trainers": {"diffusion", "models", "data", "generation", "hub"},
    "evaluation": {"diffusion", "models", "data", "generation"},
}
# `model.generate(...)` is the sampler as a method; it imports it when called.
INSIDE_FUNCTIONS_ONLY = {("models", "generation")}


def imports(tree: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield (absolute module name, imported inside a function) for every import below `tree`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", inside_function) for alias in node.names)
        yield from imports(node, inside_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def forbidden_imports(source: str, floor: str) -> list[str]:
    """Return the imports of `source`, a module of `floor`, that point up or sideways."""
    found = []
    for name, inside_function in imports(ast.parse(source)):
        top, _, rest = name.partition(".")
        if top == "dlm_tune":
            other = rest.split(".")[0]
            allowed = other == floor or other in FLOORS[floor] or other == "__version__"
            allowed |= inside_function and (floor, other) in INSIDE_FUNCTIONS_ONLY
        else:
            allowed = floor != "diffusion" or top == "torch" or top in sys.stdlib_module_names
        if not allowed:
            found.append(name)
    return found


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    docstring_lines = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring_lines


@pytest.mark.parametrize("floor", FLOORS)
def test_arrows_point_down(floor):
    modules = sorted((PACKAGE / floor).rglob("*.py"))
    assert modules
    found = {str(path.relative_to(ROOT)): forbidden_imports(path.read_text(), floor) for path in modules}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    ("source", "floor", "expected"),
    [
        ("import numpy", "diffusion", ["numpy"]),
        ("from dlm_tune.models import load_model", "diffusion", ["dlm_tune.models.load_model"]),
        ("from dlm_tune.models import load_model", "generation", ["dlm_tune.models.load_model"]),
        ("def f():\n    import dlm_tune.cli", "trainers", ["dlm_tune.cli"]),
        ("from dlm_tune import recipe", "evaluation", ["dlm_tune.recipe"]),
        ("from dlm_tune.generation import generate", "models", ["dlm_tune.generation.generate"]),
        ("def f():\n    from dlm_tune.generation import generate", "models", []),
        ("import math\nimport torch\nfrom dlm_tune.diffusion.noise import counter_uniform", "diffusion", []),
        ("import trl\nfrom dlm_tune.data import load_datasets", "trainers", []),
    ],
)
def test_the_rule_on_arrows_itself(source, floor, expected):
    assert forbidden_imports(source, floor) == expected


def test_files_and_functions_fit_a_reader():
    scripts = [path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    long_files = {
        str(path.relative_to(ROOT)): count
        for path in MODULES + scripts
        if (count := len(path.read_text().splitlines())) > MAX_FILE_LINES
    }
    long_functions = {
        f"{path.relative_to(ROOT)}::{node.name}": code_lines(node)
        for path in MODULES + scripts
        for node in definitions(path)
        if not isinstance(node, ast.ClassDef) and code_lines(node) > MAX_FUNCTION_LINES
    }
    assert not long_files
    assert not long_functions


def test_public_definitions_are_documented():
    checked, bare = 0, []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        nodes = list(tree.body)
        classes = [node for node in nodes if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        nodes += [member for node in classes for member in node.body]
        public = [
            node
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            # setters and overloads belong to a definition that is documented
            and not any("setter" in ast.unparse(d) or "overload" in ast.unparse(d) for d in node.decorator_list)
        ]
        checked += len(public)
        bare += [f"{path.relative_to(ROOT)}::{node.name}" for node in public if not ast.get_docstring(node)]
        if path.name != "__main__.py" and not ast.get_docstring(tree):
            bare.append(str(path.relative_to(ROOT)))
    assert checked > 50
    assert not bare


def test_importing_the_package_is_light():
    script = (
        "import sys, dlm_tune; heavy = {'torch', 'transformers', 'trl', 'numpy', 'datasets'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_every_public_name_resolves():
    import dlm_tune

    names = [name for name in dlm_tune.__all__ if name != "__version__"]
    assert len(names) >= 12
    for name in names:
        assert getattr(dlm_tune, name).__name__ == name
