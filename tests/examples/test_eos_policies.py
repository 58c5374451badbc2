"""The script on EOS policies: counts by hand, canvases and likelihoods on the quickstart base, a smoke run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eos_policies import (
    Canvas,
    canvas_table,
    complete,
    likelihood_table,
    make_collator,
    measure_likelihood,
    summarise,
    tokenise,
)

from dlm_tune import load_model, load_tokenizer
from dlm_tune.data.arguments import EOS_POLICIES

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "models/quickstart-base")
EOS = 0
PAIRS = [
    {"prompt": "past of carry: ", "completion": "carried"},
    {"prompt": "plural of ox: ", "completion": "oxen"},
    {"prompt": "gerund of go: ", "completion": "going"},
    {"prompt": "past of walk: ", "completion": "walked"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return tokenise(PAIRS, tokenizer)


@pytest.fixture(scope="module")
def model():
    return load_model(BASE).eval()


def test_summary_against_counts_by_hand():
    references = [[5, 6], [5, 6], [7], [8]]
    # right; right length but wrong; empty; never ends
    answers = [[5, 6, EOS, 9], [6, 5, EOS, EOS], [EOS, 7, EOS, EOS], [8, 8, 8, 8]]
    summary = summarise(answers, references, EOS)
    assert summary["ended"] == 0.75
    assert summary["length"] == (2 + 2 + 0 + 4) / 4
    assert summary["same_length"] == 0.5
    assert summary["exact"] == 0.25
    assert summary["empty"] == 0.25
    # sample standard deviation of (1, 0, 0, 0) and of the lengths, over the square root of four
    assert summary["exact_error"] == pytest.approx(math.sqrt((0.75**2 + 3 * 0.25**2) / 3) / 2)
    assert summary["length_error"] == pytest.approx(math.sqrt((0 + 0 + 4 + 4) / 3) / 2)


def test_rows_have_no_eos_and_only_answers_are_targets(rows, tokenizer):
    for row, pair in zip(rows, PAIRS, strict=True):
        assert EOS not in row["input_ids"]
        assert tokenizer.decode(row["input_ids"]) == pair["prompt"] + pair["completion"]
        assert tokenizer.decode([label for label in row["labels"] if label != -100]) == pair["completion"]


def test_one_is_what_trl_makes_of_text_rows(rows, tokenizer):
    """TRL ends text completions with EOS, so that `none` on text rows is `one` here."""
    ended = [{key: row[key] + [EOS] for key in ("input_ids", "labels")} for row in rows]
    batches = [
        make_collator(policy, tokenizer)([row | {"row_index": i} for i, row in enumerate(part)])
        for policy, part in (("one", rows), ("none", ended), ("one", ended))
    ]
    for key in ("input_ids", "attention_mask", "target_mask"):
        assert torch.equal(batches[0][key], batches[1][key])
        assert torch.equal(batches[0][key], batches[2][key])


def test_canvas_of_the_answers_own_length(model, tokenizer, rows):
    answers = complete(model, tokenizer, rows, Canvas(None, None))
    assert [len(answer) for answer in answers] == [len(pair["completion"]) + 1 for pair in PAIRS]
    for row, pair, answer in zip(rows, PAIRS, answers, strict=True):
        size = len(pair["completion"]) + 1
        assert complete(model, tokenizer, [row], Canvas(size, size)) == [answer]
    assert [len(answer) for answer in complete(model, tokenizer, rows, Canvas(6, 3), batch_size=3)] == [6] * 4


@pytest.mark.parametrize("policy", EOS_POLICIES)
def test_likelihood_of_a_policy(policy, model, tokenizer, rows):
    collator = make_collator(policy, tokenizer)
    together, apart = (measure_likelihood(model, collator, rows, size) for size in (4, 1))
    assert together["nats_per_answer"] == pytest.approx(together["nats_per_token"] * together["targets"])
    # prompt and answer of the four rows: 15 + 7, 14 + 4, 14 + 5, 14 + 6 tokens
    answer, end = (7 + 4 + 5 + 6) / 4, {"one": 1, "none": 0}.get(policy)
    if end is not None:
        assert together["targets"] == answer + end
        assert together["eos_share"] == pytest.approx(end / (answer + end))
    elif policy == "pad_to_block":
        assert together["targets"] == 18
    else:
        assert together["targets"] == answer + 1 + (0 + 4 + 3 + 2) / 4
    for key in ("targets", "nats_per_token", "nats_per_token_error"):
        is_same = together[key] == pytest.approx(apart[key], rel=1e-5)
        assert is_same == (policy != "pad_to_max"), "only this policy depends on the batch"


def test_tables_are_markdown():
    summary = {f"{name}{suffix}": 0.5 for name in ("ended", "length", "same_length", "exact", "empty")
               for suffix in ("", "_error")}  # fmt: skip
    canvases = [(None, None, False), (18, 6, True)]
    names = ("max_new_tokens", "block_length", "suppress_eos_confidence")
    table = canvas_table(
        [{"policy": "one", **dict(zip(names, canvas, strict=True)), **summary} for canvas in canvases]
    )
    assert (
        table[2] == "| `one` | answer + 1 | no | 50.0 ± 50.0 | 0.5 ± 0.5 | 50.0 ± 50.0 | 50.0 ± 50.0 | 50.0 ± 50.0 |"
    )
    assert table[3].startswith("| `one` | 18 / 6 | yes |")
    figures = dict.fromkeys(("targets", "eos_share", "nats_per_token", "nats_per_token_error"), 0.25)
    figures |= {"nats_per_answer": 2.0, "nats_per_answer_error": 0.5}
    lines = likelihood_table([{"policy": "none", "batch_size": 8, **figures}])
    assert lines[2] == "| `none` | 8 | 0.2 | 25 | 0.250 ± 0.250 | 2.000 ± 0.500 |"
    for part in (table, lines):
        assert len({line.count("|") for line in part}) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smoke_run(tmp_path):
    pytest.importorskip("lemminflect", reason="needs the extra `quickstart`")
    command = [sys.executable, "examples/quickstart/eos_policies.py", "--smoke", "--output_dir", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert all(f"| `{policy}` | answer + 1 | no |" in finished.stdout for policy in EOS_POLICIES)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["answers"]) == 2 * len(EOS_POLICIES)
    assert len(results["likelihoods"]) == len(EOS_POLICIES) + 1
    assert (tmp_path / "pad_to_block" / "adapter_model.safetensors").is_file()
