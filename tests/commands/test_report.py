"""`dlm-tune report`: the page and the picture show what the log says, load nothing, and give nothing away."""

import html
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from dlm_tune.cli import main
from dlm_tune.commands.report_figures import DASHES, PALETTE, draw_panel, spread, value_with_error
from dlm_tune.commands.report_page import number
from dlm_tune.commands.report_panels import (
    NUM_COLOURS,
    NUM_DASHES,
    make_panels,
    running_mean,
    smoothing_window,
)
from dlm_tune.commands.report_run import distinct_names, read_run, read_runs, redact
from tests.test_recipes_shipped import write_rows
from tests.tiny_models import save_tiny_checkpoint

BUCKETS = ("00_25", "25_50", "50_75", "75_100")


def log_entry(step: int) -> dict[str, float]:
    """An entry as the trainer writes it, every figure of its own."""
    entry = {
        "step": step,
        "epoch": step / 7,
        "loss": 2.5 / step,
        "grad_norm": 1 / (step + 1),
        "learning_rate": 1e-3 / step,
    }
    entry |= {"nelbo": 3.75 / step, "masked_accuracy": 1 - 1 / (step + 1), "num_tokens": 100.0 * step}
    for index, name in enumerate(BUCKETS):
        entry |= {
            f"nll_masked_{name}": (index + 1.5) / step,
            f"accuracy_masked_{name}": 1 - (index + 1) / (9 * step + 9),
        }
    return entry


def evaluation(nelbo: float) -> dict[str, float]:
    return {"eval_loss": nelbo, "eval_nelbo": nelbo, "eval_nelbo_standard_error": nelbo / 10, "eval_runtime": 3.0}


def write_run(
    folder, steps=range(1, 9), checkpoint=None, eval_every=4, finished=True, recipe="learning_rate: 0.001\n"
):
    """A run on disk; with `checkpoint`, one that still goes on."""
    log = []
    for step in steps:
        log.append(log_entry(step))
        if eval_every and step % eval_every == 0:
            log.append({"step": step, "epoch": 1.0} | evaluation(4.0 / step))
    if finished:
        log.append({"step": steps[-1], "train_runtime": 46.0, "train_loss": 1.0, "total_flos": 1e9})
    state = {"log_history": log, "global_step": steps[-1], "max_steps": 8}
    where = folder / checkpoint if checkpoint else folder
    where.mkdir(parents=True, exist_ok=True)
    (where / "trainer_state.json").write_text(json.dumps(state))
    if checkpoint is None:
        before, after = ({"epoch": 0} | evaluation(value) for value in (8.0, 0.25))
        results = {"before": before, "after": after, "torch": "2.13.0", "dlm_tune": "0.1.0", "num_processes": 1}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "recipe.yaml").write_text(recipe)
    return folder


def report(*folders, output=None) -> str:
    arguments = [str(folder) for folder in folders] + (["--output", str(output)] if output else [])
    assert main(["report", "--debug", *arguments]) == 0
    return (output or folders[0] / "report.html").read_text()


def visible_text(page: str) -> str:
    """The page's text without tags and style."""
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


def panels_by_title(runs) -> dict:
    panels = make_panels(runs)
    assert len({panel.name for panel in panels}) == len(panels)
    return {panel.title: panel for panel in panels}


# The figures are the log's


def test_paired_and_unpaired_rows_have_a_panel(tmp_path):
    entries = [log_entry(step) | {"nelbo_paired": 1.0 / step, "nelbo_unpaired": 2.0 / step} for step in (1, 2, 3)]
    for name, log in (("mixed", entries), ("plain", [log_entry(step) for step in (1, 2, 3)])):
        write_run(tmp_path / name)
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    mixed, plain = read_runs([tmp_path / "mixed", tmp_path / "plain"])
    (panel,) = (panel for panel in make_panels([mixed]) if panel.name == "nelbo_paired")
    assert {curve.label: curve.series.values for curve in panel.curves} == {
        "paired": [1.0, 0.5, 1 / 3],
        "unpaired": [2.0, 1.0, 2 / 3],
    }
    assert not [panel for panel in make_panels([plain]) if "paired" in panel.name]
    several = [panel.name for panel in make_panels([mixed, plain]) if "paired" in panel.name]
    assert several == ["nelbo_paired", "nelbo_unpaired"]


def test_curves_hold_the_points_of_the_log(tmp_path):
    run = read_run(write_run(tmp_path), "run")
    panels = panels_by_title([run])
    steps = list(range(1, 9))
    for title, keys in {
        "Training loss and NELBO": ["loss", "nelbo"],
        "Loss by noise level": [f"nll_masked_{name}" for name in BUCKETS],
        "Accuracy by noise level": [f"accuracy_masked_{name}" for name in BUCKETS],
        "Gradient norm": ["grad_norm"],
        "Learning rate": ["learning_rate"],
    }.items():
        for key, curve in zip(keys, panels[title].curves, strict=True):
            assert curve.series.steps == steps
            assert curve.series.values == [log_entry(step)[key] for step in steps]
    assert [curve.label for curve in panels["Loss by noise level"].curves] == [
        "0-25 %",
        "25-50 %",
        "50-75 %",
        "75-100 %",
    ]
    held_out = panels["Held-out NELBO"].curves[0]
    # before training, twice during it; after the last step the log has the figure already
    assert held_out.series.steps == [0, 4, 8]
    assert held_out.series.values == [8.0, 1.0, 0.5]
    assert held_out.errors == [0.8, 0.1, 0.05]
    assert "Throughput" not in panels


def test_what_is_drawn_is_what_the_panel_holds(tmp_path):
    run = read_run(write_run(tmp_path, range(1, 101)), "run")
    for panel in make_panels([run]):
        axes = draw_panel(Figure(), panel)
        drawn = [line.get_xydata().tolist() for line in axes.lines]
        for curve in panel.curves:
            raw = [list(pair) for pair in zip(curve.series.steps, curve.series.values, strict=True)]
            mean = running_mean(curve.series.values, curve.window)
            assert raw in drawn
            assert [list(pair) for pair in zip(curve.series.steps, mean, strict=True)] in drawn
            assert curve.window == (7 if panel.name in ("loss", "grad_norm") or "masked" in panel.name else 1)
        assert ("7 log entries" in panel.caption) == (panel.curves[0].window == 7)
        low, high = axes.get_ylim()
        assert all(low <= value <= high for curve in panel.curves for value in curve.series.values)


def test_the_band_is_one_standard_error(tmp_path):
    run = read_run(write_run(tmp_path), "run")
    panel = panels_by_title([run])["Held-out NELBO"]
    axes = draw_panel(Figure(), panel)
    vertices = {tuple(point) for path in axes.collections[0].get_paths() for point in path.vertices.tolist()}
    for step, value, error in zip([0, 4, 8], [8.0, 1.0, 0.5], [0.8, 0.1, 0.05], strict=True):
        assert {(step, value - error), (step, value + error)} <= vertices
    assert axes.get_yscale() == "log"
    assert "log scale" in [text.get_text() for text in axes.figure.texts][1]
    assert "0.500\n± 0.050" in [text.get_text() for text in axes.texts]


def test_evaluation_data_sets_do_not_replace_each_other(tmp_path):
    folder = write_run(tmp_path, eval_every=0, recipe="max_grad_norm: [1]\n")
    state = json.loads((folder / "trainer_state.json").read_text())
    values = {(step, name): step + index / 4 for step in (2, 4) for index, name in enumerate("ab")}
    state["log_history"] += [{"step": step, f"eval_{name}_nelbo": value} for (step, name), value in values.items()]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    panels = panels_by_title([read_run(folder, "run")])
    for name in "ab":
        series = panels[f"Held-out NELBO ({name})"].curves[0].series
        assert (series.steps, series.values) == ([2, 4], [values[2, name], values[4, name]])


def test_tables_hold_the_figures_of_log_and_results(tmp_path):
    folder = write_run(tmp_path)
    text = visible_text(report(folder))
    for step in range(1, 9):
        for key, value in log_entry(step).items():
            if key != "epoch":
                assert re.search(rf"(?<![\d.]){re.escape(number(value))}(?![\d.])", text), (key, value)
    assert "8.00 ± 0.80" in text
    assert "0.250 ± 0.025" in text
    assert "learning_rate: 0.001" in text
    assert "torch 2.13.0" in text
    assert "finished at step 8 of 8" in text


def test_throughput_leaves_evaluations_out_and_is_not_guessed(tmp_path):
    run = read_run(write_run(tmp_path / "a"), "run")
    assert run.tokens_per_second() == pytest.approx(800 / (46 - 2 * 3))
    resumed = read_run(write_run(tmp_path / "b", recipe="resume_from_checkpoint: last\n"), "run")
    assert resumed.tokens_per_second() is None
    assert read_run(write_run(tmp_path / "c", finished=False), "run").tokens_per_second() is None


def test_logged_throughput_is_drawn(tmp_path):
    folder = write_run(tmp_path)
    state = json.loads((folder / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        entry["tokens_per_second"] = 50.0 * entry["step"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(folder, "run")
    # 100 tokens at each of the rates 50, 100, ..., 400
    assert run.tokens_per_second() == pytest.approx(800 / sum(100 / (50 * step) for step in range(1, 9)))
    panel = panels_by_title([run])["Throughput"]
    assert panel.curves[0].series.values[:2] == [50.0, 100.0]
    assert draw_panel(Figure(), panel).get_ylim()[0] == 0


def test_loss_that_is_the_nelbo_is_drawn_once(tmp_path):
    folder = write_run(tmp_path)
    text = (folder / "trainer_state.json").read_text()
    state = json.loads(text)
    for entry in state["log_history"]:
        if "loss" in entry:
            entry["nelbo"] = entry["loss"] * 1.001
    (folder / "trainer_state.json").write_text(json.dumps(state))
    panel = panels_by_title([read_run(folder, "run")])["Training loss"]
    assert len(panel.curves) == 1
    assert "within 1 %" in panel.caption


# The page and the picture


class Loads(HTMLParser):
    """Collects what a page would load, its ids, and open tags."""

    def __init__(self):
        super().__init__()
        self.loaded, self.ids, self.open, self.scripts = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag in ("script", "link", "iframe", "object", "embed", "img", "base")
        self.scripts += any(name.startswith("on") for name, _ in attributes)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.loaded.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(page: str) -> None:
    parser = Loads()
    parser.feed(page)
    assert parser.open == []
    assert parser.scripts == 0
    assert all(value.startswith("#") for value in parser.loaded)
    assert parser.loaded, "markers are shared within a plot"
    assert {value[1:] for value in parser.loaded} <= set(parser.ids)
    assert len(parser.ids) == len(set(parser.ids))
    targets = re.findall(r"url\(([^)]*)\)", page)
    assert all(target.startswith("#") and target[1:] in parser.ids for target in targets)
    assert "@import" not in page
    assert "nan" not in re.sub(r"<[^>]*>", "", page).lower().replace("finance", "")
    assert set(re.findall(r"https?://[^\"'\s<>]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    plots = [svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if "xmlns=" in svg]
    assert len(plots) >= 4
    for svg in plots:
        ET.fromstring(svg)


def test_page_is_self_contained_and_picture_valid(tmp_path):
    folder = write_run(tmp_path)
    page = report(folder)
    check_page(page)
    assert "default-src 'none'" in page
    with Image.open(io.BytesIO((folder / "report.png").read_bytes())) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 2000
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    for name in ("ink", "run0", "run1", "bucket0", "bucket3"):
        light = PALETTE[name][0]
        assert tuple(int(light[i : i + 2], 16) for i in (1, 3, 5)) in colours


def test_colours_follow_the_readers_theme(tmp_path):
    page = report(write_run(tmp_path))
    body = page[page.index("<body>") :]
    assert not [light for light, _ in PALETTE.values() if light in body]
    used = set(re.findall(r"var\(--(\w+)\)", body))
    assert {"ink", "muted", "grid", "run0", "bucket0"} <= used
    style = page[page.index("<style>") : page.index("</style>")]
    assert all(style.count(f"--{name}: ") == 2 for name in used), "each colour is defined for light and for dark"


def test_report_is_reproducible(tmp_path):
    folder = write_run(tmp_path)
    first = report(folder), (folder / "report.png").read_bytes()
    assert (report(folder), (folder / "report.png").read_bytes()) == first


@pytest.mark.parametrize("kind", ["no evaluation", "one entry", "not finite", "flat", "no recipe"])
def test_little_to_show_is_shown(tmp_path, kind, capsys):
    folder = write_run(tmp_path, range(1, 2) if kind == "one entry" else range(1, 9), eval_every=0)
    path = folder / "trainer_state.json"
    state = json.loads(path.read_text())
    if kind != "one entry":
        (folder / "results.json").unlink()
    if kind == "no recipe":
        (folder / "recipe.yaml").unlink()
    if kind == "flat":
        for entry in state["log_history"]:
            entry |= {"loss": 0.0, "nelbo": 0.0, "grad_norm": 2.0, "learning_rate": 0.0}
    if kind == "not finite":
        state["log_history"][2] |= {"loss": math.nan, "grad_norm": math.inf}
    path.write_text(json.dumps(state))
    page = report(folder)
    if kind == "not finite":
        assert "2 values of the log are not finite" in page
        assert "2 values of the log are not finite" in capsys.readouterr().out
        panels = panels_by_title([read_run(folder, "run")])
        assert panels["Gradient norm"].curves[0].series.steps == [1, 2, 4, 5, 6, 7, 8]
    else:
        check_page(page)
    assert ("Held-out NELBO" in re.findall('aria-label="([^"]*)"', page)) == (kind == "one entry")


def test_long_logs_stay_small_and_say_so(tmp_path):
    page = report(write_run(tmp_path, range(1, 3001), eval_every=0))
    assert "one entry in 15" in page
    assert len(page) < 800_000
    assert f"<td>{number(2.5 / 3000)}</td>" in page


# Several runs


def test_runs_are_overlaid_and_told_apart(tmp_path):
    names = [f"run{index}" for index in range(NUM_COLOURS + 2)]
    folders = [
        write_run(tmp_path / name / "out", recipe=f"output_dir: {name}\nseed: {index}\nlora_r: 8\n")
        for index, name in enumerate(names)
    ]
    page = report(*folders, output=tmp_path / "all.html")
    check_page(page)
    assert (tmp_path / "all.png").is_file()
    assert not (folders[0] / "report.html").exists()
    panels = panels_by_title(read_runs(folders))
    assert {
        "Training loss",
        "NELBO of the training batches",
        "Loss, 0-25 % masked",
        "Accuracy, 75-100 % masked",
    } <= set(panels)
    for panel in panels.values():
        assert [curve.label for curve in panel.curves] == names
        assert len({(curve.colour, curve.dashes) for curve in panel.curves}) == len(names)
    assert re.findall(r"<li>.*?</svg>(.*?)</li>", page) == names
    differences = page[page.index("Where the recipes differ") : page.index("Evaluation before")]
    assert "<td>seed</td>" + "".join(f"<td>{index}</td>" for index in range(len(names))) in differences
    assert "lora_r" not in differences
    assert "output_dir" not in differences


def test_a_run_without_a_quantity_keeps_its_colour_in_the_others(tmp_path):
    runs = read_runs([write_run(tmp_path / "a", eval_every=0), write_run(tmp_path / "b")])
    object.__setattr__(runs[0], "results", {})
    held_out = panels_by_title(runs)["Held-out NELBO"]
    assert [(curve.label, curve.colour) for curve in held_out.curves] == [("b", "run1")]


def test_styles_are_as_many_as_promised():
    assert len(DASHES) == NUM_DASHES
    assert all(f"run{index}" in PALETTE for index in range(NUM_COLOURS))


def test_names_are_what_differs(tmp_path):
    paths = [tmp_path / "x" / name / "adapter" for name in ("seed0", "seed1")]
    assert distinct_names(paths) == ["seed0", "seed1"]
    assert distinct_names(paths[:1]) == ["seed0/adapter"]
    assert distinct_names([tmp_path / "a", tmp_path / "a" / "b"]) == ["a", "a/b"]
    assert distinct_names([tmp_path / "bad\nname"])[0].endswith("bad?name")


# Runs that go on, and files that are not what they should be


def test_a_run_that_goes_on_is_read_from_its_newest_checkpoint(tmp_path):
    write_run(tmp_path, range(1, 3), checkpoint="checkpoint-2", finished=False)
    write_run(tmp_path, range(1, 6), checkpoint="checkpoint-5", finished=False)
    (tmp_path / "checkpoint-7").mkdir()  # not written to its end
    os.utime(tmp_path / "checkpoint-5" / "trainer_state.json", (1, 1))  # a copy lost its times
    page = report(tmp_path)
    assert "at step 5 of 8" in page
    assert "finished" not in page
    assert "Read from checkpoint-5" in page


def test_an_older_run_in_the_same_folder_is_not_mixed_in(tmp_path):
    folder = write_run(tmp_path, recipe="learning_rate: 0.0421337\n")
    old = folder / "trainer_state.json"
    state = json.loads(old.read_text())
    state["log_history"][0]["loss"] = 123.0
    old.write_text(json.dumps(state))
    os.utime(old, (1, 1))
    write_run(folder, range(1, 4), checkpoint="checkpoint-3", finished=False)
    run = read_run(folder, "run")
    assert run.step == 3
    assert (run.recipe, run.results) == ({}, {})
    assert "earlier run" in " ".join(run.notes)
    assert "0.0421337" not in report(folder)


def test_a_finished_run_wins_over_its_checkpoints_whatever_the_times(tmp_path):
    write_run(tmp_path, range(1, 5), checkpoint="checkpoint-4", finished=False)
    folder = write_run(tmp_path)
    os.utime(folder / "trainer_state.json", (1, 1))
    run = read_run(folder, "run")
    assert (run.step, run.is_finished, run.notes) == (8, True, ())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (None, ["does not exist", "output_dir"]),
        ({}, ["holds no training run", "trainer_state.json", "checkpoint-*"]),
        ({"adapter/trainer_state.json": "{}"}, ["Did you mean", "adapter?"]),
        ({"trainer_state.json": '{"log_history": ['}, ["trainer_state.json is not whole JSON", "try again"]),
        ({"trainer_state.json": "[1]"}, ["holds list", "not written by dlm-tune"]),
        ({"trainer_state.json": "{}"}, ["has no log_history"]),
        ({"trainer_state.json": '{"log_history": []}'}, ["the log is empty", "logging_steps"]),
        ({"trainer_state.json": '{"log_history": [{"step": 1, "loss": NaN}]}'}, ["holds no finite number"]),
        ({"trainer_state.json": '{"log_history": [{"step": NaN, "loss": 1}]}'}, ["holds no finite number"]),
        (
            {"trainer_state.json": '{"log_history": [{"step": 1, "x": 1}]}'},
            ["none of the quantities", "fewer steps than logging_steps"],
        ),
        ({"recipe.yaml": "a: [1"}, ["recipe.yaml is not YAML"]),
        ({"recipe.yaml": "- 1"}, ["recipe.yaml is not a recipe"]),
        ({"results.json": "nonsense"}, ["results.json is not whole JSON"]),
    ],
)
def test_errors_name_the_file_and_the_remedy(tmp_path, capsys, files, expected):
    folder = tmp_path / "run"
    if files is not None:
        if any(name in files for name in ("recipe.yaml", "results.json")):
            write_run(folder)
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    assert main(["report", str(folder)]) == 2
    printed = capsys.readouterr().err
    assert str(folder) in printed
    for part in expected:
        assert part in printed
    assert not (folder / "report.html").exists()


def test_faults_of_all_folders_come_together(tmp_path, capsys):
    good = write_run(tmp_path / "good")
    bad = [tmp_path / "bad1", tmp_path / "bad2"]
    assert main(["report", *map(str, [good, *bad]), "--output", str(tmp_path / "all.html")]) == 2
    printed = capsys.readouterr().err
    assert "bad1" in printed
    assert "bad2" in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["no run", "output_dir"]),
        (["a", "b"], ["several runs", "--output FILE.html"]),
        (["a", "--output", "page.pdf"], ["page.pdf", ".html"]),
        (["a", "--output"], [".html"]),
        (["a", "--output=missing/page.html"], ["missing does not exist"]),
        (
            ["a", "--learning_rate", "1", "--output", "x.html", "--output", "y.html"],
            ["--learning_rate", "given twice"],
        ),
        (["a", "./a", "--output", "x.html"], ["given twice"]),
    ],
)
def test_wrong_command_lines(arguments, expected, capsys):
    assert main(["report", *arguments]) == 2
    printed = capsys.readouterr().err
    for part in expected:
        assert part in printed


def test_too_many_runs_are_refused(capsys):
    names = [f"r{index}" for index in range(NUM_COLOURS * NUM_DASHES + 1)]
    assert main(["report", *names, "--output", "x.html"]) == 2
    assert "24 at most" in capsys.readouterr().err


# Text that is not ours


HOSTILE = "</pre><script>alert(1)</script><img src=http://evil/x onerror=alert(2)>&amp; $\\frac{1}$ #0072b2"


def test_hostile_text_stays_text(tmp_path):
    recipe = json.dumps({"hub_model_id": HOSTILE, HOSTILE: 1, "output_dir": "x"})  # JSON is YAML
    folders = [write_run(tmp_path / f"_{index} <b>$x$ & \"'" / "out", recipe=recipe) for index in range(2)]
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        results["torch"] = HOSTILE
        results["before"][f"eval_{HOSTILE}"] = 1.0
        (folder / "results.json").write_text(json.dumps(results))
        state = json.loads((folder / "trainer_state.json").read_text())
        state["log_history"][0][HOSTILE] = 1.0
        (folder / "trainer_state.json").write_text(json.dumps(state))
    second = json.loads((folders[1] / "recipe.yaml").read_text()) | {"hub_model_id": HOSTILE + "!"}
    (folders[1] / "recipe.yaml").write_text(json.dumps(second))
    for page in (report(folders[0]), report(*folders, output=tmp_path / "all.html")):
        parser = Loads()
        parser.feed(page)
        assert (parser.open, parser.scripts) == ([], 0)
        assert all(value.startswith("#") for value in parser.loaded)
        assert html.escape(HOSTILE) in page
        assert "<b>$x$" not in page


SECRETS = {
    "hub_token": "hf_abcdefghijklmnopqrstuvwxyz",
    "model_init_kwargs": {"token": "s3cr3t-1", "dtype": "auto", "headers": [{"Authorization": "s3cr3t-2"}]},
    "push_to_hub_token": "s3cr3t-3",
    "wandb_api_key": "s3cr3t-4",
    "run_name": "see https://me:s3cr3t-5@example.org and hf_s3cr3tABCDEFGHIJKLMNOP",
}
HARMLESS = {
    "eos_token": "<|end|>",
    "max_new_tokens": 18,
    "include_num_input_tokens_seen": "no",
    "use_auth_token": True,
}


def test_secrets_are_not_shown(tmp_path):
    folder = write_run(tmp_path, recipe=json.dumps(SECRETS | HARMLESS))
    other = write_run(tmp_path / "other", recipe=json.dumps({"hub_token": "s3cr3t-6"}))
    for page in (report(folder), report(folder, other, output=tmp_path / "all.html")):
        assert "s3cr3t" not in page
        assert "hf_" not in page
        assert "(not shown)" in page
        assert "example.org" in page
    assert redact(HARMLESS) == HARMLESS
    assert redact({"hub_token": None}) == {"hub_token": None}


# Small functions


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.integers(0, 6))
def test_running_mean_averages_around_each_point(values, reach):
    means = running_mean(values, 2 * reach + 1)
    assert len(means) == len(values)
    for i, mean in enumerate(means):
        part = [value for j, value in enumerate(values) if abs(i - j) <= reach]
        assert mean == pytest.approx(math.fsum(part) / len(part), abs=1e-9)


def test_running_mean_keeps_straight_lines():
    line = [3.0 - 0.5 * i for i in range(50)]
    assert running_mean(line, 9)[4:-4] == pytest.approx(line[4:-4])
    assert running_mean(line, 1) == line
    assert [smoothing_window(n) for n in (1, 29, 30, 60, 200)] == [1, 1, 3, 5, 13]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_do_not_overlap_and_keep_their_order(places):
    moved = spread(places, 11.0, 0.0, 100.0)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for lower, upper in itertools.pairwise(order):
        assert moved[upper] - moved[lower] >= 11 - 1e-9
    assert min(moved) >= -1e-9
    assert max(moved) <= 100 + 1e-9
    if all(places[b] - places[a] >= 11 for a, b in itertools.pairwise(order)):
        assert moved == pytest.approx(places)


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.019776, 0.00104, "0.0198 ± 0.0010"),
        (2.1121, 0.01406, "2.112 ± 0.014"),
        (12345.6, 321.0, "12346 ± 321"),
        (0.5, None, "0.5"),
        (0.5, math.nan, "0.5"),
        (1.23456789, 0.0, "1.235"),
    ],
)
def test_value_with_error(value, error, expected):
    assert value_with_error(value, error) == expected


def test_report_needs_no_torch(tmp_path):
    folder = write_run(tmp_path)
    code = (
        "import sys; from dlm_tune.cli import main; assert main(['report', sys.argv[1]]) == 0;"
        "heavy = {'torch', 'transformers', 'trl', 'matplotlib.pyplot'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)


# A real run


def test_report_of_a_real_run(tmp_path):
    save_tiny_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "pairs", "pairs")
    arguments = ["sft", "--debug", "--model_name_or_path", str(tmp_path / "model"), "--use_cpu", "--max_steps", "3"]
    arguments += [
        "--dataset_name",
        str(tmp_path / "pairs"),
        "--output_dir",
        str(tmp_path / "run"),
        "--max_length",
        "64",
    ]
    arguments += ["--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no"]
    assert main([*arguments, "--report_to", "none", "--per_device_train_batch_size", "4"]) == 0
    check_page(report(tmp_path / "run"))
    run = read_run(tmp_path / "run", "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    panels = panels_by_title([run])
    held_out = panels["Held-out NELBO"].curves[0]
    assert held_out.series.steps == [0, 2, 3]
    assert held_out.series.values[0] == results["before"]["eval_nelbo"]
    assert held_out.series.values[2] == results["after"]["eval_nelbo"]
    assert held_out.errors[2] == results["after"]["eval_nelbo_standard_error"]
    assert {"Loss by noise level", "Accuracy by noise level", "Gradient norm", "Learning rate"} <= set(panels)
    assert panels["Learning rate"].curves[0].series.steps == [1, 2, 3]
    assert run.is_finished
    assert run.tokens_per_second() > 0
