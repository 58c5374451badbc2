"""Every command and every Python example in the documentation is run, page by page, in a copy of the checkout.

A fence says how its block is treated: "```bash" and "```python" run by default, "```bash slow" with the slow tests,
and "```bash gpu" not at all, because it needs a GPU or the Hub. Anything else is not code to run. The numbers of
blocks are asserted, so that a block cannot vanish from the tests unnoticed.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\((?P<target>[^)\s]+)\)|\!\[[^\]]*\]\((?P<image>[^)\s]+)\)")
SET_UP = "set-up"  # installs into .venv and runs the tests themselves: CI calls these targets
BLOCK_KINDS = ("bash", "bash slow", "bash gpu", "python", "python slow", "python gpu", SET_UP)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, what kind it is, its text."""

    page: str
    line: int
    kind: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    blocks = []
    for match in FENCE.finditer(text):
        kind, code = match["info"].strip(), match["code"]
        lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
        if kind == "bash" and all(re.match("make (quickstart|test)|git clone|cd ", line) for line in lines):
            kind = SET_UP
        blocks.append(Block(page.name, text.count("\n", 0, match.start()) + 1, kind, code))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
EXPECTED_BLOCKS = {
    "bash": 19, "bash slow": 8, "bash gpu": 27, "python": 19, "python slow": 1, "python gpu": 4, SET_UP: 3,
}  # fmt: skip


def pages_with(*kinds: str) -> list[str]:
    return sorted({block.page for block in BLOCKS if block.kind in kinds})


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked and new files, and the quickstart's data as `make quickstart` writes it."""
    folder = tmp_path_factory.mktemp("checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run([sys.executable, "examples/quickstart/inflection_data.py"], cwd=folder, check=True)
    return folder


def environment(checkout: Path) -> dict[str, str]:
    """This environment's commands first on the PATH, and the copy's package before the installed one."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }


def run_block(block: Block, checkout: Path) -> None:
    if block.kind.startswith("bash"):
        command = ["bash", "-euo", "pipefail", "-c", block.code]
    else:
        command = [sys.executable, "-c", block.code]
    finished = subprocess.run(
        command, cwd=checkout, env=environment(checkout), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    where = f"{block.page}:{block.line}"
    assert finished.returncode == 0, f"{where}\n{block.code}\n{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"


def test_every_block_is_counted():
    counted = Counter(block.kind for block in BLOCKS)
    code = [block for block in BLOCKS if block.kind.startswith(("bash", "python", "sh", "console", "py"))]
    assert not [block for block in code if block.kind not in BLOCK_KINDS], f"use one of {BLOCK_KINDS}"
    assert {kind: counted[kind] for kind in BLOCK_KINDS} == EXPECTED_BLOCKS


@pytest.mark.parametrize("page", pages_with("bash", "python"))
def test_quick_blocks_run(page, checkout):
    blocks = [block for block in BLOCKS if block.page == page and block.kind in ("bash", "python")]
    for block in blocks:
        run_block(block, checkout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", pages_with("bash slow", "python slow"))
def test_all_blocks_run_in_order(page, checkout):
    kinds = ("bash", "bash slow", "python", "python slow")
    for block in [block for block in BLOCKS if block.page == page and block.kind in kinds]:
        run_block(block, checkout)


def test_links_lead_somewhere():
    checked, broken = 0, []
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        for match in LINK.finditer(text):
            target = match["target"] or match["image"]
            if re.match(r"[a-z]+:", target):
                continue
            checked += 1
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in anchors_of(file)):
                broken.append(f"{page.name}: {target}")
    assert checked >= 8
    assert not broken


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+\s+(.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_index_lists_every_page():
    linked = set(re.findall(r"\((\w[\w-]*\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
