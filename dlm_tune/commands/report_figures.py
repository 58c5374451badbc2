"""Draws the panels of a report with matplotlib: SVG for the page, one PNG of all panels."""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from dlm_tune.commands.report_panels import NUM_COLOURS, Curve, Panel, running_mean, smoothing_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

# Runs: Okabe and Ito's colour-blind-safe colours. Buckets: one ramp from little to much noise.
# (light, dark): the PNG has the light ones; in the page each becomes a CSS variable.
PALETTE = {
    "ink": ("#1f2329", "#e4e7eb"),
    "muted": ("#5b6470", "#9aa4b0"),
    "grid": ("#e3e6ea", "#31363d"),
    "run0": ("#0072b2", "#4ea9e0"),
    "run1": ("#d55e00", "#f5894a"),
    "run2": ("#009e73", "#2fc498"),
    "run3": ("#cc79a7", "#e09cc2"),
    "run4": ("#b88600", "#e9bc4b"),
    "run5": ("#56b4e9", "#9ad4f5"),
    "bucket0": ("#d99a1e", "#f4c869"),
    "bucket1": ("#cc5a45", "#f08a6c"),
    "bucket2": ("#9a3273", "#d567a9"),
    "bucket3": ("#4a2a8f", "#a48bea"),
}
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")  # NUM_DASHES of them
_SIZE = (4.1, 2.8)  # inches of one panel
_DPI = 200
_LOG_RATIO = 10  # largest over smallest value from which an axis is logarithmic
_MANY_POINTS = 400
_FONTS = ["Inter", "Helvetica Neue", "Helvetica", "Arial", "DejaVu Sans"]


def panel_svg(panel: Panel) -> str:
    """An `<svg>` element for a page that defines the palette as CSS variables `--ink`, `--run0`, ..."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=_SIZE)
        draw_panel(figure, panel)
        buffer = io.StringIO()
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    # ids are unique within a figure only
    text = re.sub(r'\bid="([^"]+)"', rf'id="{panel.name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{panel.name}-", text)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))


def panels_png(panels: list[Panel], title: str, run_names: list[str]) -> bytes:
    """All panels in one picture, three or four in a row, with a legend where there are several runs."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    groups = [list(group) for _, group in groupby(panels, key=lambda panel: panel.group)]
    longest = max(map(len, groups))
    columns = min(4 if len(groups) > 1 or longest > 6 else 3, longest)
    rows = [group[start : start + columns] for group in groups for start in range(0, len(group), columns)]
    legend_rows = -(-len(run_names) // (2 * columns)) if len(run_names) > 1 else 0
    top, bottom = 0.45 + 0.24 * legend_rows, 0.35
    with _style():
        height = len(rows) * _SIZE[1] + top + bottom
        figure = Figure(figsize=(columns * _SIZE[0], height), facecolor="white", dpi=_DPI)
        figure.text(
            0.02 / columns, 1 - 0.28 / height, title, fontsize=12, fontweight="bold", color=_colour("ink"), va="center"
        )
        if legend_rows:
            handles = [
                Line2D(
                    [],
                    [],
                    color=_colour(f"run{index % NUM_COLOURS}"),
                    linestyle=DASHES[index // NUM_COLOURS],
                    linewidth=2,
                )
                for index in range(len(run_names))
            ]
            names = [f"\u200a{name}" for name in run_names]  # matplotlib leaves out labels that begin with "_"
            anchor = (0.02 / columns, 1 - 0.45 / height)
            figure.legend(
                handles, names, loc="upper left", bbox_to_anchor=anchor, ncols=2 * columns, frameon=False,
                labelcolor=_colour("ink"), fontsize=9, borderpad=0, borderaxespad=0, handlelength=2.4,
            )  # fmt: skip
        notes = [smoothing_note(curve for panel in panels for curve in panel.curves)]
        notes += ["Band: ± one standard error."] * any(curve.errors for panel in panels for curve in panel.curves)
        figure.text(0.02 / columns, 0.12 / height, " ".join(notes).strip(), fontsize=8, color=_colour("muted"))
        for row, members in enumerate(rows):
            y = (bottom + (len(rows) - 1 - row) * _SIZE[1]) / height
            for column, panel in enumerate(members):
                draw_panel(figure, panel, (column / columns, y, 1 / columns, _SIZE[1] / height))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def draw_panel(
    figure: "Figure | FigureBase", panel: Panel, frame: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
) -> "Axes":
    """Draw one panel into `frame` (left, bottom, width, height as fractions of the figure)."""
    left, bottom, width, height = frame
    inner = (0.14, 0.16, 0.64 if panel.has_labels else 0.81, 0.62)
    axes = figure.add_axes((left + inner[0] * width, bottom + inner[1] * height, inner[2] * width, inner[3] * height))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_colour("muted"))
    axes.grid(axis="y", color=_colour("grid"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", which="both", colors=_colour("muted"), length=0, labelsize=8, pad=4)
    for curve in panel.curves:
        _draw_curve(axes, curve)
    _scale_axes(axes, panel)
    is_log = axes.get_yscale() == "log"
    unit = ", ".join(filter(None, (panel.unit, "log scale" if is_log else "")))
    x = left + 0.02 * width
    figure.text(x, bottom + 0.91 * height, panel.title, fontsize=10.5, fontweight="bold", color=_colour("ink"))
    figure.text(x, bottom + 0.835 * height, unit, fontsize=8.5, color=_colour("muted"))
    axes.set_xlabel("step", fontsize=8.5, color=_colour("muted"), labelpad=2)
    if panel.reference is not None:
        _draw_reference(axes, *panel.reference)
    if panel.has_labels:
        _label_ends(axes, panel)
    return axes


def _draw_curve(axes: "Axes", curve: Curve) -> None:
    steps, values, colour = curve.series.steps, curve.series.values, _colour(curve.colour)
    if curve.errors is not None:
        errors = [math.nan if error is None else error for error in curve.errors]
        lower = [value - error for value, error in zip(values, errors, strict=True)]
        upper = [value + error for value, error in zip(values, errors, strict=True)]
        axes.fill_between(steps, lower, upper, color=colour, alpha=0.25, linewidth=0)
        axes.errorbar(steps, values, errors, fmt="none", ecolor=colour, elinewidth=1.2, capsize=0)
    if curve.window > 1 and len(values) <= _MANY_POINTS:
        axes.plot(steps, values, linestyle="", marker="o", markersize=2.4, markeredgewidth=0, color=colour, alpha=0.35)
    elif curve.window > 1:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6)
    is_dotted = curve.window == 1 and len(values) <= 40
    axes.plot(
        steps,
        running_mean(values, curve.window),
        color=colour,
        linewidth=1.7,
        linestyle=DASHES[curve.dashes],
        marker="o" if is_dotted else "",
        markersize=5 if len(values) == 1 else 3.2,
        markeredgewidth=0,
        solid_capstyle="round",
        clip_on=False,
        label=f"\u200a{curve.label}",
    )


def _scale_axes(axes: "Axes", panel: Panel) -> None:
    """Steps from zero; values on a logarithmic axis where they span much and it can hold them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    last = max(max(curve.series.steps) for curve in panel.curves)
    axes.set_xlim(0, max(last, 1))
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    lowest = min(min(_lower_ends(curve)) for curve in panel.curves)
    highest = max(max(curve.series.values) for curve in panel.curves)
    if panel.percent:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
    elif not panel.from_zero and lowest > 0 and highest / lowest > _LOG_RATIO:
        axes.set_yscale("log")
        decades = math.log10(highest / lowest)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        if panel.from_zero:
            axes.set_ylim(bottom=0)


def _lower_ends(curve: Curve) -> list[float]:
    errors = curve.errors or [None] * len(curve.series)
    return [value - (error or 0.0) for value, error in zip(curve.series.values, errors, strict=True)]


def _draw_reference(axes: "Axes", value: float, label: str) -> None:
    low, high = axes.get_ylim()
    if not low <= value <= high:
        return
    axes.axhline(value, color=_colour("muted"), linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(
        label, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        ha="right", fontsize=7.5, color=_colour("muted"),
    )  # fmt: skip


def _label_ends(axes: "Axes", panel: Panel) -> None:
    """Names of the lines at their ends, or the value of a single line there, pushed apart where they overlap."""
    ends, texts = [], []
    for curve in panel.curves:
        last = running_mean(curve.series.values, curve.window)[-1]
        ends.append(axes.transData.transform((0, last))[1])
        texts.append(curve.label if len(panel.curves) > 1 else _last_value(curve, last, panel.percent))
    gap = 11 * axes.figure.dpi / 72
    low, high = axes.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    for curve, text, end in zip(panel.curves, texts, spread(ends, gap, low, high), strict=True):
        y = axes.transAxes.inverted().transform((0, end))[1]
        axes.text(
            1.025, y, text, transform=axes.transAxes, va="center", fontsize=8.5, fontweight="bold",
            color=_colour(curve.colour),
        )  # fmt: skip


def spread(places: list[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Move places apart to at least `gap`, in their order, around where they were and between `low` and `high`."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    groups: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        groups.append([index])
        centres.append(places[index])
        while len(groups) > 1 and centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            last = groups.pop()
            centres.pop()
            groups[-1] += last
            reach = gap * (len(groups[-1]) - 1) / 2
            mean = sum(places[member] for member in groups[-1]) / len(groups[-1])
            centres[-1] = max(low + reach, min(high - reach, mean))
    moved = list(places)
    for group, centre in zip(groups, centres, strict=True):
        for rank, index in enumerate(group):
            moved[index] = centre + gap * (rank - (len(group) - 1) / 2)
    return moved


def _last_value(curve: Curve, value: float, percent: bool) -> str:
    error = curve.errors[-1] if curve.errors else None
    if percent:
        return f"{100 * value:.1f} %"
    return _tick(value, 0) if error is None else value_with_error(value, error).replace(" ±", "\n±")


def value_with_error(value: float, error: float | None) -> str:
    """`0.0198 ± 0.0010`: both with the decimals of two digits of the error."""
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    decimals = min(9, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _tick(value: float, _: Any) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _colour(name: str) -> str:
    return PALETTE[name][0]


@contextmanager
def _style() -> Iterator[None]:
    """Settings of matplotlib for one figure: text stays text, names are not formulas, ids are reproducible."""
    from matplotlib import rc_context

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "dlm-tune",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": _FONTS,
    }
    with rc_context(settings):
        yield
