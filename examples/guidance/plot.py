"""Plots and tables of the guidance experiments, from results/<task>.jsonl.

    python examples/guidance/plot.py                                   # SVGs to docs/images, tables to the terminal
    python examples/guidance/plot.py --output_dir outputs/guidance     # SVGs elsewhere

Figures are means over training seeds; error bars and the numbers after ± are standard errors over seeds. The last
table has each seed by itself: the gain of the best guidance scale over none, in standard errors over the sampled
answers.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from guidance_scores import read_lines
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[2]
ARM_NAMES = {
    "sft_only": "pairs only",
    "sft_half": "pairs only, half the steps",
    "unsupervised": "with unpaired text (unsupervised)",
    "standard": "prompt dropout 0.1 (standard)",
    "standard_unpaired": "unpaired text and dropout",
    "distilled": "distilled",
}
REAL = {"real": "real glosses", "real_known_words": "real, no unknown word"}
COLOURS = dict(zip(ARM_NAMES, ("#555555", "#aaaaaa", "#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
LABELS = {
    "guidance_scale": "guidance scale w",
    "adherence": "adherence",
    "nelbo": "NELBO under the judge, nats per word",
    "distinct_2": "distinct-2",
    "distinct_1": "distinct-1",
    "length": "length, words or phonemes",
    "phoneme_error_rate": "phoneme error rate",
    "exact_match": "exact match",
}
FIGURES = {
    "category": ("adherence", "nelbo", "distinct_1", "distinct_2", "length"),
    "g2p": ("phoneme_error_rate", "exact_match", "length"),
}
# file name -> (task, x, y)
PLOTS = {
    "guidance-adherence": ("category", "guidance_scale", "adherence"),
    "guidance-fluency": ("category", "nelbo", "adherence"),
    "guidance-diversity": ("category", "distinct_2", "adherence"),
    "guidance-g2p-errors": ("g2p", "guidance_scale", "phoneme_error_rate"),
    "guidance-g2p-exact": ("g2p", "guidance_scale", "exact_match"),
}
BEST = {"category": ("adherence", 1), "g2p": ("phoneme_error_rate", -1)}  # and whether more is better


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over seeds; the error of one seed is 0, for want of a better."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Arm -> guidance scale -> the rows of its seeds, arms in the order of `ARM_NAMES`."""
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for arm in ARM_NAMES:
        for row in sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["guidance_scale"]):
            found.setdefault(arm, {}).setdefault(row["guidance_scale"], []).append(row)
    return found


def draw(rows: list[dict[str, Any]], x: str, y: str, path: Path) -> None:
    """One curve an arm, its points in the order of the guidance scales; w = 0 is a hollow point."""
    figure, axes = pyplot.subplots(figsize=(5.2, 3.4))
    for arm, points in curves(rows).items():
        xs, x_errors = zip(*(over_seeds([row[x] for row in seeds]) for seeds in points.values()), strict=True)
        ys, y_errors = zip(*(over_seeds([row[y] for row in seeds]) for seeds in points.values()), strict=True)
        bars = {"xerr": None if x == "guidance_scale" else x_errors, "yerr": y_errors}
        axes.errorbar(
            xs, ys, **bars, color=COLOURS[arm], label=ARM_NAMES[arm], marker="o", markersize=3, linewidth=1.2,
            elinewidth=0.8, capsize=1.5,
        )  # fmt: skip
        axes.plot(xs[:1], ys[:1], marker="o", markersize=6, markerfacecolor="white", color=COLOURS[arm], linewidth=0)
    for row in (row for row in rows if row["arm"] in REAL and x in row):
        axes.plot(
            row[x],
            row[y],
            marker="*" if row["arm"] == "real" else "P",
            markersize=7,
            color="black",
            linewidth=0,
            label=REAL[row["arm"]],
        )
    axes.set_xlabel(LABELS[x])
    axes.set_ylabel(LABELS[y])
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def scales_table(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: one figure, arms by guidance scales, means over seeds ± standard errors over seeds."""
    found = curves(rows)
    scales = sorted({scale for points in found.values() for scale in points})
    lines = [f"| {LABELS[name]} | seeds | {' | '.join(f'w = {scale:g}' for scale in scales)} |"]
    lines.append("|---" * (2 + len(scales)) + "|")
    for arm, points in found.items():
        means = {scale: over_seeds([row[name] for row in seeds]) for scale, seeds in points.items()}
        cells = (f"{means[scale][0]:.3f} ± {means[scale][1]:.3f}" if scale in means else "" for scale in scales)
        lines.append(f"| `{arm}` | {min(map(len, points.values()))} | {' | '.join(cells)} |")
    real = [f"{REAL[row['arm']]}: {row[name]:.3f}" for row in rows if row["arm"] in REAL]
    return [*lines, *(["", "; ".join(real)] if real else [])]


def branches_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: held-out NELBO of the branches of each arm, means over seeds ± standard errors over seeds."""
    lines = ["| arm | seeds | with the prompt | prompt masked |", "|---" * 4 + "|"]
    for arm in ARM_NAMES:
        seeds = [row for row in rows if row["arm"] == f"branches of {arm}"]
        if seeds:
            figures = (over_seeds([row[name] for row in seeds]) for name in ("nelbo_cond", "nelbo_uncond"))
            cells = " | ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in figures)
            lines.append(f"| `{arm}` | {len(seeds)} | {cells} |")
    return lines


def gains_table(task: str, rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: for each arm and seed the best scale, and its gain over w = 0 in standard errors over answers."""
    name, sign = BEST[task]
    lines = [
        f"| arm | seed | {LABELS[name]}, w = 0 | best w | {LABELS[name]} | gain | gain / s.e. |",
        "|---" * 7 + "|",
    ]
    for arm in ARM_NAMES:
        for seed in sorted({row["seed"] for row in rows if row["arm"] == arm}):
            own = {row["guidance_scale"]: row for row in rows if row["arm"] == arm and row["seed"] == seed}
            if 0.0 not in own or len(own) < 2:
                continue
            start, best = own[0.0], max(own.values(), key=lambda row: sign * row[name])
            gain = sign * (best[name] - start[name]) + 0.0  # no negative zero
            error = math.hypot(best[f"{name}_error"], start[f"{name}_error"])
            values = (
                f"{start[name]:.3f} ± {start[f'{name}_error']:.3f}",
                f"{best[name]:.3f} ± {best[f'{name}_error']:.3f}",
            )
            lines.append(
                f"| `{arm}` | {seed} | {values[0]} | {best['guidance_scale']:g} | {values[1]} | {gain:+.3f} | "
                f"{gain / error:.1f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=ROOT / "examples/guidance/results")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs/images")
    arguments = parser.parse_args()
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "guidance", "font.size": 9})
    results = {task: read_lines(arguments.results_dir / f"{task}.jsonl") for task in FIGURES}
    for name, (task, x, y) in PLOTS.items():
        if results[task]:
            draw(results[task], x, y, arguments.output_dir / f"{name}.svg")
            print(arguments.output_dir / f"{name}.svg")
    for task, rows in results.items():
        if rows:
            for name in FIGURES[task]:
                print("", *scales_table(name, rows), sep="\n")
            print("", *gains_table(task, rows), "", *branches_table(rows), sep="\n")


if __name__ == "__main__":
    main()
