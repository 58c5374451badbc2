"""Plot and tables of the conversion experiments, from results/nelbo.jsonl.

    python examples/conversion/plot.py                                   # SVG to docs/images, tables to the terminal
    python examples/conversion/plot.py --output_dir outputs/conversion   # SVG elsewhere

Figures are means over seeds; error bars and the numbers after ± are standard errors over seeds.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[2]
ARM_NAMES = {
    "scratch": "from scratch",
    "plain": "AR weights",
    "annealing": "AR weights, annealing",
    "shift": "AR weights, shift",
    "shift_annealing": "AR weights, shift, annealing",
}
COLOURS = dict(zip(ARM_NAMES, ("#555555", "#56b4e9", "#0072b2", "#e69f00", "#d55e00"), strict=True))


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over seeds; the error of one seed is 0, for want of a better."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def select(rows: list[dict[str, Any]], arm: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[int, list[float]]:
    """NELBO of the lines of an arm, step -> one number a seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["arm"] == arm and wanted(row):
            found.setdefault(row["step"], []).append(row["nelbo"])
    return dict(sorted(found.items()))


def is_held_out(row: dict[str, Any]) -> bool:
    return row.get("attention") == "full"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out NELBO against steps, one curve an arm."""
    figure, axes = pyplot.subplots(figsize=(5.2, 3.4))
    for arm, label in ARM_NAMES.items():
        curve = select(rows, arm, is_held_out)
        if not curve:
            continue
        means, errors = zip(*map(over_seeds, curve.values()), strict=True)
        axes.errorbar(
            list(curve), means, yerr=errors, color=COLOURS[arm], label=label, marker="o", markersize=3,
            linewidth=1.2, elinewidth=0.8, capsize=1.5,
        )  # fmt: skip
    axes.set_xlabel("optimiser steps of masked diffusion")
    axes.set_ylabel("held-out NELBO, nats a character")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def cell(values: Sequence[float]) -> str:
    mean, error = over_seeds(values)
    return f"{mean:.3f} ± {error:.3f}" if len(values) > 1 else f"{mean:.3f}"


def held_out_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: held-out NELBO of each arm, causal at step 0 and in both directions at each step."""
    steps = sorted({step for arm in ARM_NAMES for step in select(rows, arm, is_held_out)})
    lines = [f"| arm | seeds | 0, causal | {' | '.join(map(str, steps))} |", "|---" * (3 + len(steps)) + "|"]
    for arm in ARM_NAMES:
        curve = select(rows, arm, is_held_out)
        if curve:
            causal = select(rows, arm, lambda row: row.get("attention") == "causal")[0]
            cells = " | ".join([cell(causal), *(cell(curve[step]) if step in curve else "" for step in steps)])
            lines.append(f"| `{arm}` | {len(causal)} | {cells} |")
    return lines


def training_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: NELBO of the training rows under the attention of the step."""
    curves = {arm: select(rows, arm, lambda row: row.get("kind") == "training") for arm in ARM_NAMES}
    steps = sorted({step for curve in curves.values() for step in curve})
    lines = [f"| arm | {' | '.join(map(str, steps))} |", "|---" * (1 + len(steps)) + "|"]
    for arm, curve in curves.items():
        if curve:
            lines.append(f"| `{arm}` | {' | '.join(cell(curve[step]) if step in curve else '' for step in steps)} |")
    return lines


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: held-out NELBO less that of `plain` with the same seed, whose rows and noise are the same."""
    curves = {arm: select(rows, arm, is_held_out) for arm in ARM_NAMES}
    lines = [f"| less `plain` | {' | '.join(map(str, curves['plain']))} |", "|---" * (1 + len(curves["plain"])) + "|"]
    for arm in ("annealing", "shift", "shift_annealing"):
        cells = []
        for step, reference in curves["plain"].items():
            mean, error = over_seeds(
                [ours - theirs for ours, theirs in zip(curves[arm][step], reference, strict=False)]
            )
            cells.append(f"{mean:+.3f} ± {error:.3f}")
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_file", type=Path, default=ROOT / "examples/conversion/results/nelbo.jsonl")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs/images")
    arguments = parser.parse_args()
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "conversion", "font.size": 9})
    rows = [json.loads(line) for line in arguments.results_file.read_text().splitlines()]
    draw(rows, arguments.output_dir / "conversion-nelbo.svg")
    print(arguments.output_dir / "conversion-nelbo.svg")
    for table in (held_out_table(rows), differences(rows), training_table(rows)):
        print("", *table, sep="\n")


if __name__ == "__main__":
    main()
