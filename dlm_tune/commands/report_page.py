"""The HTML page of a report: one file, no scripts, nothing loaded from anywhere. All text from files is escaped."""

import math
import re
from collections.abc import Iterable
from html import escape

from dlm_tune import __version__
from dlm_tune.commands.report_figures import DASHES, PALETTE, panel_svg, value_with_error
from dlm_tune.commands.report_panels import NUM_COLOURS, Panel
from dlm_tune.commands.report_run import Run, numbers_of

MAX_LOG_ROWS = 200
_METRICS = {
    "eval_nelbo": "held-out NELBO, nats per token",
    "eval_perplexity_bound": "perplexity, upper bound",
    "eval_masked_accuracy": "accuracy at masked tokens",
    "eval_num_rows": "rows",
}
_LOG_COLUMNS = ("step", "loss", "nelbo", "masked_accuracy", "grad_norm", "learning_rate", "num_tokens")
# Beside what is of no interest: standard errors, which stand with their quantity
_HIDDEN = re.compile(r"eval_(\w+_)?loss|epoch|\w+_(preparation_time|runtime|per_second|standard_error)")
_DASH_NAMES = {"-": "", "--": "8 4", ":": "2 3", "-.": "8 3 2 3"}

_CSS = """
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1500px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 17px; margin: 40px 0 12px }
p { margin: 4px 0 }
.muted, figcaption, th { color: var(--muted) }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 370px), 1fr)); gap: 20px 28px;
  margin-bottom: 20px }
.four { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
@media (max-width: 1447px) { .four { grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)) } }
figure { margin: 0 }
svg { display: block; width: 100%; height: auto }
figcaption { font-size: 12.5px; padding-left: 2% }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 8px 0 16px; padding: 0; list-style: none }
.legend svg { display: inline-block; width: 34px; height: 10px; margin-right: 8px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 5px 16px 5px 0; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap }
th { font-weight: 500 }
th:first-child, td:first-child, table.text td { text-align: left }
table.text td { white-space: pre-wrap; overflow-wrap: anywhere }
pre { background: var(--panel); padding: 14px 18px; overflow-x: auto; font-size: 13px; line-height: 1.45 }
summary { cursor: pointer }
"""


def render_page(runs: list[Run], panels: list[Panel], title: str) -> str:
    """The page as HTML text."""
    sections = [
        f"<header><h1>{escape(title)}</h1>{''.join(_status(run, len(runs) > 1) for run in runs)}</header>",
        f"<section><h2>Summary</h2>{_summary(runs)}</section>",
        f"<section><h2>Curves</h2>{_legend(runs)}{_plots(panels)}</section>",
        _comparison(runs),
        _evaluations(runs),
        _recipes(runs),
        *(_log(run, len(runs) > 1) for run in runs),
        _versions(runs),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_colours()}{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def number(value: float | None, digits: int = 6) -> str:
    """A figure of the log with so many significant digits; whole numbers in full."""
    if value is None:
        return "-"
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def _colours() -> str:
    light = {"paper": "#ffffff", "panel": "#f5f6f8"} | {name: pair[0] for name, pair in PALETTE.items()}
    dark = {"paper": "#15181c", "panel": "#1e2227"} | {name: pair[1] for name, pair in PALETTE.items()}
    texts = ["; ".join(f"--{name}: {value}" for name, value in colours.items()) for colours in (light, dark)]
    return f"\n:root {{ {texts[0]} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {texts[1]} }} }}"


def _status(run: Run, is_one_of_many: bool) -> str:
    planned = f" of {run.max_steps:,}" if run.max_steps else ""
    state = "finished at step" if run.is_finished else "at step"
    name = f"<b>{escape(run.name)}</b>: " if is_one_of_many else ""
    notes = "".join(f" {escape(note)}" for note in run.notes)
    return f'<p class="muted">{name}{escape(str(run.folder))}, {state} {run.step:,}{planned}.{notes}</p>'


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of cells that are text, not HTML."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _with_error(metrics: dict[str, float], key: str = "eval_nelbo", digits: int = 6) -> str:
    value, error = metrics.get(key), metrics.get(f"{key}_standard_error")
    return number(value, digits) if value is None or error is None else value_with_error(value, error)


def _summary(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        seconds = sum(entry.get("train_runtime", 0.0) for entry in run.log)
        tokens, loss, rate = run.series("num_tokens"), run.series("loss"), run.tokens_per_second()
        evaluations = list(run.evaluations())
        first, last = (evaluations[0][1], evaluations[-1][1]) if evaluations else ({}, {})
        rows.append(
            [
                run.name,
                f"{run.step:,}",
                number(tokens.values[-1]) if len(tokens) else "-",
                _duration(seconds) if seconds else "-",
                f"{rate:,.0f}" if rate else "-",
                f"{loss.values[-1]:.4g}" if len(loss) else "-",
                _with_error(first),
                _with_error(last),
            ]
        )
    header = ("run", "steps", "tokens", "training time", "tokens/s", "last loss", "first held-out NELBO", "last")
    note = '<p class="muted">Losses in nats per token. Tokens per second: mean over training, without evaluations.</p>'
    return _table(header, rows) + note


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
    )


def _legend(runs: list[Run]) -> str:
    if len(runs) < 2:
        return ""
    items = []
    for index, run in enumerate(runs):
        dashes = _DASH_NAMES[DASHES[index // NUM_COLOURS]]
        line = f'stroke="var(--run{index % NUM_COLOURS})" stroke-width="3" stroke-dasharray="{dashes}"'
        swatch = f'<svg viewBox="0 0 34 10" aria-hidden="true"><path d="M0 5H34" {line}/></svg>'
        items.append(f"<li>{swatch}{escape(run.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _plots(panels: list[Panel]) -> str:
    groups: dict[str, list[str]] = {}
    for panel in panels:
        svg = panel_svg(panel).replace("<svg", f'<svg role="img" aria-label="{escape(panel.title)}"', 1)
        caption = f"<figcaption>{escape(panel.caption)}</figcaption>" if panel.caption else ""
        groups.setdefault(panel.group, []).append(f"<figure>{svg}{caption}</figure>")
    return "".join(
        f'<div class="plots{" four" if len(figures) == 4 else ""}">{"".join(figures)}</div>'
        for figures in groups.values()
    )


def _evaluations(runs: list[Run]) -> str:
    """All metrics of `results.json`, before and after."""
    parts = []
    for run in runs:
        parts_of_run = [numbers_of(run.results.get(when)) for when in ("before", "after")]
        known = {key for part in parts_of_run for key in part if not _HIDDEN.fullmatch(key)}
        keys = [*(key for key in _METRICS if key in known), *sorted(known - {*_METRICS})]
        rows = [[_metric_name(key), *(_with_error(part, key, digits=4) for part in parts_of_run)] for key in keys]
        if rows:
            name = f"<p><b>{escape(run.name)}</b></p>" if len(runs) > 1 else ""
            parts.append(name + _table(("", "before", "after"), rows))
    return f"<section><h2>Evaluation before and after training</h2>{''.join(parts)}</section>" if parts else ""


def _metric_name(key: str) -> str:
    if bucket := re.fullmatch(r"eval_(nll|accuracy)_masked_(\d+)_(\d+)", key):
        kind = "loss, nats per masked token" if bucket[1] == "nll" else "accuracy"
        return f"{kind}, {int(bucket[2])}-{int(bucket[3])} % masked"
    return _METRICS.get(key, key.removeprefix("eval_"))


def _comparison(runs: list[Run]) -> str:
    """Keys whose values differ between the recipes."""
    recipes = [run.recipe for run in runs if run.recipe]
    if len(recipes) < 2:
        return ""
    keys = [key for recipe in recipes for key in recipe if key != "output_dir"]
    shown = [
        [str(key), *(str(run.recipe.get(key, "-")) for run in runs)]
        for key in dict.fromkeys(keys)
        if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)
    ]
    table = _table(["key", *(run.name for run in runs)], shown, "text") if shown else "<p>Nothing but output_dir.</p>"
    return f"<section><h2>Where the recipes differ</h2>{table}</section>"


def _recipes(runs: list[Run]) -> str:
    parts = [
        f"<details{' open' if len(runs) == 1 else ''}><summary>{escape(run.name)}/recipe.yaml</summary>"
        f"<pre>{escape(run.recipe_text)}</pre></details>"
        for run in runs
        if run.recipe
    ]
    return f"<section><h2>Recipe</h2>{''.join(parts)}</section>" if parts else ""


def _log(run: Run, is_one_of_many: bool) -> str:
    """The log as a table, evenly thinned to `MAX_LOG_ROWS` entries; evaluations have a table of their own."""
    entries = [entry for entry in run.log if not any(key.startswith(("eval_", "train_")) for key in entry)]
    keys = {key for entry in entries for key in entry}
    columns = [key for key in _LOG_COLUMNS if key in keys]
    columns += sorted(keys - {*columns, "epoch", "mean_timestep", "fraction_masked"})
    stride = -(-len(entries) // MAX_LOG_ROWS)
    thinned = entries[::-1][:: max(stride, 1)][::-1]  # the last entry is always there
    tables = [_table(columns, ([number(entry.get(key)) for key in columns] for entry in thinned))]
    evaluations = [(step, part) for step, part in run.evaluations()]
    if evaluations:
        rows = (
            [f"{step:,}", _with_error(part), number(part.get("eval_masked_accuracy"))] for step, part in evaluations
        )
        tables.append(_table(("step", "held-out NELBO ± standard error", "accuracy at masked tokens"), rows))
    which = f"one entry in {stride}" if stride > 1 else "all entries"
    name = f" of {escape(run.name)}" if is_one_of_many else ""
    return f"<section><details><summary>Log{name} as a table ({which})</summary>{''.join(tables)}</details></section>"


def _versions(runs: list[Run]) -> str:
    texts = []
    for run in runs:
        facts = [f"{key} {run.results[key]}" for key in ("dlm_tune", "torch", "num_processes") if key in run.results]
        if facts:
            texts.append(f"{run.name}: {', '.join(facts)}")
    trained = f"Trained with {'; '.join(texts)}. " if texts else ""
    return f'<footer><p class="muted">{escape(trained)}Page written by dlm-tune {__version__} report.</p></footer>'
