"""Which curves a report shows, as plain numbers: titles, units, smoothing, standard errors."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dlm_tune.commands.report_run import Run, Series

NUM_COLOURS = 6
NUM_DASHES = 4
MAX_RUNS = NUM_COLOURS * NUM_DASHES
_BUCKET = re.compile(r"_masked_(\d+)_(\d+)$")


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        label: what the line shows.
        series: the points as logged.
        colour: name in the palette of `report_figures`.
        dashes: number of the line style.
        errors: standard error of each point, None where there is none.
        window: log entries that the line averages; 1 is the points themselves.
    """

    label: str
    series: Series
    colour: str
    dashes: int = 0
    errors: list[float | None] | None = None
    window: int = 1


@dataclass(frozen=True)
class Panel:
    """A plot against the training step.

    Attributes:
        name: identifier.
        title: what is shown.
        unit: unit of the values, and which way is better.
        curves: at least one, each with at least one point.
        has_labels: write the curves' labels (or the value of a single one) at their ends; otherwise a legend tells.
        percent: show fractions as percentages.
        from_zero: the axis begins at zero.
        reference: a dashed line with its label.
        note: what a reader must know.
        group: panels of one group stand together.
    """

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    has_labels: bool = True
    percent: bool = False
    from_zero: bool = False
    reference: tuple[float, str] | None = None
    note: str = ""
    group: str = ""

    @property
    def caption(self) -> str:
        """How the lines were made from the log."""
        return " ".join(filter(None, (smoothing_note(self.curves), self.note)))


def make_panels(runs: list[Run]) -> list[Panel]:
    """All panels for which some run has points, in the order of the page."""
    panels = [*_loss_panels(runs), *_part_panels(runs), *_held_out_panels(runs)]
    buckets = [
        *_bucket_panels(runs, "nll", "Loss by noise level", "nats per masked token"),
        *_bucket_panels(runs, "accuracy", "Accuracy by noise level", "% of masked tokens"),
    ]
    limits = [run.recipe.get("max_grad_norm") for run in runs]
    reference = limits[0] if all(limit == limits[0] for limit in limits) else None
    is_limit = isinstance(reference, int | float) and reference > 0
    others = [
        replace(
            _run_panel(runs, "grad_norm", "Gradient norm", "before clipping", smooth=True),
            reference=(float(reference), f"max_grad_norm {reference:g}") if is_limit and reference else None,
            note="Of the step that is logged.",
        ),
        _run_panel(runs, "learning_rate", "Learning rate", "", from_zero=True),
        _run_panel(runs, "tokens_per_second", "Throughput", "tokens per second", smooth=True, from_zero=True),
    ]
    panels += [*others, *buckets] if len(runs) > 1 else [*buckets, *others]
    return [panel for panel in panels if panel.curves]


def running_mean(values: list[float], window: int) -> list[float]:
    """Centred mean over `window` values (odd); at the ends over those of them that there are."""
    reach = window // 2
    parts = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def smoothing_note(curves: Iterable[Curve]) -> str:
    """What the lines of smoothed curves are; empty where none is smoothed."""
    windows = sorted({curve.window for curve in curves if curve.window > 1})
    if not windows:
        return ""
    sizes = f"{windows[0]}" if len(windows) == 1 else f"{windows[0]} to {windows[-1]}"
    return f"Line: centred mean of {sizes} log entries; faint: the entries."


def smoothing_window(num_points: int) -> int:
    """About a fifteenth of the points, odd; 1 (no smoothing) for fewer than 30."""
    return 2 * (num_points // 30) + 1


def _run_panel(
    runs: list[Run], key: str, title: str, unit: str, smooth: bool = False, from_zero: bool = False
) -> Panel:
    """One curve a run."""
    curves = []
    for index, run in enumerate(runs):
        series = run.series(key)
        window = smoothing_window(len(series)) if smooth else 1
        if len(series):
            colour, dashes = f"run{index % NUM_COLOURS}", index // NUM_COLOURS
            curves.append(Curve(run.name, series, colour, dashes, window=window))
    return Panel(key, title, unit, tuple(curves), has_labels=len(runs) == 1, from_zero=from_zero)


def _loss_panels(runs: list[Run]) -> list[Panel]:
    """Loss and NELBO of the training batches; one panel where the loss is the NELBO."""
    unit = "nats per token, lower is better"
    loss = _run_panel(runs, "loss", "Training loss", unit, smooth=True)
    nelbo = _run_panel(runs, "nelbo", "NELBO of the training batches", unit, smooth=True)
    if all(_are_close(run.series("loss"), run.series("nelbo")) for run in runs):
        return [replace(loss, note="The NELBO of the training batches is the same within 1 %.")]
    if len(runs) > 1 or not loss.curves or not nelbo.curves:
        return [loss, nelbo]
    pair = (replace(loss.curves[0], label="loss"), replace(nelbo.curves[0], label="NELBO", colour="run1"))
    return [replace(loss, title="Training loss and NELBO", curves=pair)]


def _part_panels(runs: list[Run]) -> list[Panel]:
    """NELBO of paired and of unpaired rows, where a run has both."""
    unit = "nats per token, lower is better"
    parts = [
        _run_panel(runs, f"nelbo_{part}", f"NELBO of the {part} rows", unit, smooth=True)
        for part in ("paired", "unpaired")
    ]
    if len(runs) > 1 or not all(panel.curves for panel in parts):
        return parts
    curves = (
        replace(parts[0].curves[0], label="paired"),
        replace(parts[1].curves[0], label="unpaired", colour="run1"),
    )
    return [replace(parts[0], title="NELBO of paired and unpaired rows", curves=curves)]


def _are_close(first: Series, second: Series) -> bool:
    return first.steps == second.steps and all(
        abs(a - b) <= 1e-2 * abs(b) for a, b in zip(first.values, second.values, strict=True)
    )


def _held_out_panels(runs: list[Run]) -> list[Panel]:
    """Held-out NELBO with its standard error, a panel for each evaluation data set."""
    keys = sorted({key for run in runs for key in run.quantities() if re.fullmatch(r"eval_(\w+_)?nelbo", key)})
    panels = []
    for key in keys:
        name = key.removeprefix("eval_").removesuffix("nelbo").strip("_")
        curves = []
        for index, run in enumerate(runs):
            series, errors = run.evaluation_series(key), run.evaluation_series(f"{key}_standard_error")
            by_step = dict(zip(errors.steps, errors.values, strict=True))
            if len(series):
                colour, dashes = f"run{index % NUM_COLOURS}", index // NUM_COLOURS
                curves.append(Curve(run.name, series, colour, dashes, [by_step.get(step) for step in series.steps]))
        title = f"Held-out NELBO ({name})" if name else "Held-out NELBO"
        note = "Band: ± one standard error over rows."
        unit = "nats per token, lower is better"
        panels.append(Panel(key, title, unit, tuple(curves), has_labels=len(runs) == 1, note=note))
    return panels


def _bucket_panels(runs: list[Run], kind: str, title: str, unit: str) -> list[Panel]:
    """A quantity by share of masked tokens: one panel for a run, one for each bucket for several runs."""
    keys = {key: found for run in runs for key in run.quantities() if (found := _BUCKET.search(key))}
    names = sorted((key for key in keys if key == f"{kind}{keys[key][0]}"), key=lambda key: int(keys[key][1]))
    ranges = {name: f"{int(keys[name][1])}-{int(keys[name][2])} %" for name in names}
    if not names:
        return []
    percent = kind == "accuracy"
    each = [
        replace(
            _run_panel(runs, name, f"{title.split()[0]}, {ranges[name]} masked", unit, smooth=True),
            percent=percent,
            group=kind,
        )
        for name in names
    ]
    if len(runs) > 1:
        return each
    curves = tuple(
        replace(panel.curves[0], label=ranges[name], colour=f"bucket{min(index, 3)}")
        for index, (name, panel) in enumerate(zip(names, each, strict=True))
        if panel.curves
    )
    note = "Noise level: share of target tokens that are masked."
    return [Panel(f"{kind}_masked", title, unit, curves, percent=percent, note=note)]
