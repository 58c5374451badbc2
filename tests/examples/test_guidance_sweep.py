"""The sweep over guidance scales: a run on a tiny model, and its figures by hand."""

import json
import math
import random
import statistics
import sys

import pytest
import sweep

from tests.tiny_models import save_tiny_checkpoint

SCORES = """
def letters(prompts, completions):
    assert len(prompts) == len(completions)
    return [sum(letter in prompt for letter in text) / max(1, len(text)) for prompt, text in zip(prompts, completions)]

def too_few(prompts, completions):
    return [1.0]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    save_tiny_checkpoint(folder / "model", seed=3)
    (folder / "my_scores.py").write_text(SCORES)
    messages = [{"role": "user", "content": "hello"}]
    rows = [{"prompt": "abc def"}, {"prompt": "xyz"}, {"prompt": messages}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder, monkeypatch, output, *options, score="my_scores:letters"):
    arguments = ["--model_name_or_path", "model", "--use_cpu", "--prompts_file", "prompts.jsonl", "--score", score]
    arguments += ["--output_dir", output, "--max_new_tokens", "8", "--samples", "2", "--batch_size", "4"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments, "--unit", "character", *options])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    sweep.main()


def test_a_sweep_writes_samples_figures_and_a_plot(folder, monkeypatch):
    run(folder, monkeypatch, "out", "--scales", "0", "2", "--temperature", "0.5")
    samples = [json.loads(line) for line in (folder / "out/samples.jsonl").read_text().splitlines()]
    assert [(row["guidance_scale"], row["prompt"]) for row in samples] == [
        (scale, prompt) for scale in (0.0, 2.0) for prompt in ("abc def", "xyz", "hello") for _ in range(2)
    ]
    assert [row["completion"] for row in samples[:6]] != [row["completion"] for row in samples[6:]]
    results = json.loads((folder / "out/results.json").read_text())
    assert results["arguments"]["scales"] == [0.0, 2.0]
    for rows, result in zip((samples[:6], samples[6:]), results["results"], strict=True):
        means = [(rows[i]["score"] + rows[i + 1]["score"]) / 2 for i in (0, 2, 4)]
        assert result["score"] == pytest.approx(statistics.fmean(means))
        assert result["score_error"] == pytest.approx(statistics.stdev(means) / math.sqrt(3))
        assert result["distinct_1"] == distinct_n([row["completion"] for row in rows], 1)
    unguided, guided = results["results"]
    assert unguided["num_row_passes"] <= 48 < guided["num_row_passes"] <= 96
    plot = (folder / "out/sweep.svg").read_text()
    assert "w = 2" in plot
    assert "my_scores:letters" in plot


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("my_scores:too_few", "my_scores:too_few must return one finite number for each of 6 pairs"),
        ("my_scores:nothing", "my_scores has no function nothing"),
        ("my_scores", "must be module:function"),
    ],
)
def test_bad_scores_are_named(folder, monkeypatch, score, words):
    with pytest.raises(SystemExit, match=words):
        run(folder, monkeypatch, "bad", "--scales", "0", score=score)


def distinct_n(texts, n):
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams)


def test_the_jackknife_error_is_that_of_leaving_groups_out():
    groups = [["aba", "c"], ["ade"], ["bbbf"], ["gab"]]
    for n in (1, 2):
        left_out = []
        for index in range(len(groups)):
            left_out.append(
                distinct_n([text for place, group in enumerate(groups) for text in group if place != index], n)
            )
        expected = math.sqrt(3 / 4 * sum((value - statistics.fmean(left_out)) ** 2 for value in left_out))
        value, error = sweep.distinct_and_error(groups, n, "character")
        assert value == distinct_n([text for group in groups for text in group], n)
        assert error == pytest.approx(expected)
    assert sweep.distinct_and_error([["a b", "b c"]], 2, "word")[0] == 1
    assert math.isnan(sweep.distinct_and_error([["a"], ["b"]], 2, "word")[0])


def test_the_jackknife_error_is_the_spread_over_samples_of_prompts():
    """Letters from a law with a long tail: the mean jackknife error against the deviation over repetitions."""
    generator = random.Random(0)
    letters = [chr(200 + index) for index in range(400)]
    weights = [1 / (1 + index) for index in range(400)]
    values, errors = [], []
    for _ in range(200):
        groups = [["".join(generator.choices(letters, weights, k=8))] for _ in range(60)]
        value, error = sweep.distinct_and_error(groups, 1, "character")
        values.append(value)
        errors.append(error)
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(values), rel=0.35)
