"""The quickstart's scores against counts by hand, and the whole script once, on a few rows."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scoring import choose_rows, rule_answer, score

ROOT = Path(__file__).parents[2]


def rows_of(*pairs: tuple[str, str, bool]) -> list[dict]:
    return [{"prompt": prompt, "completion": completion, "rule_fails": fails} for prompt, completion, fails in pairs]


def test_overall_scores_weigh_the_kinds_by_their_shares():
    rows = rows_of(("a", "abc", True), ("b", "abcd", True), ("c", "ab", False), ("d", "abcdef", False))
    # exact match: rule failing 1/2, rule right 0/2; in the population one pair in five is rule-failing
    population = rows_of(*[("x", "y", i % 5 == 0) for i in range(100)])
    scores = score(rows, ["abc", "abc", "abb", "xbcdxf"], population)
    assert scores.exact_match == pytest.approx({"rule_fails": 0.5, "rule_ok": 0.0, "all": 0.1})
    assert scores.standard_error["rule_fails"] == pytest.approx(math.sqrt(0.25 / 2))
    assert scores.standard_error["all"] == pytest.approx(0.2 * math.sqrt(0.25 / 2))
    # edits per pair 1/2 and 3/2, reference characters per pair 7/2 and 8/2
    assert scores.character_error_rate == pytest.approx((0.2 * 0.5 + 0.8 * 1.5) / (0.2 * 3.5 + 0.8 * 4))


def test_the_rule_scores_all_where_it_is_right_and_nothing_where_it_is_wrong():
    rows = rows_of(("past of carry: ", "carried", False), ("past of run: ", "ran", True))
    answers = [rule_answer(row["prompt"]) for row in rows]
    assert answers == ["carried", "runed"]
    scores = score(rows, answers, rows)
    assert scores.exact_match == {"rule_fails": 0.0, "rule_ok": 1.0, "all": 0.5}


def test_choice_of_rows_is_fixed_and_kind_by_kind():
    rows = rows_of(*[(f"past of w{i}: ", "x", i % 10 == 0) for i in range(100)])
    chosen = choose_rows(rows, None, 7)
    assert [row["rule_fails"] for row in chosen] == [True] * 10 + [False] * 7
    assert chosen == choose_rows(rows[::-1], None, 7)


def test_smoke_run(tmp_path):
    """Train four steps as `make quickstart` does, and report."""
    pytest.importorskip("lemminflect", reason="needs the extra `quickstart`")
    command = [sys.executable, "examples/quickstart/run.py", "--smoke", "--output_dir", str(tmp_path / "out")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for expected in ("$ dlm-tune sft --config recipes/quickstart/sft/lora.yaml", "spelling rule", "hf upload"):
        assert expected in finished.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["num_pairs"]["rule_fails"] == report["num_pairs"]["rule_ok"] == 8
    assert report["scores"]["rule"]["exact_match"]["rule_fails"] == 0
    assert report["scores"]["rule"]["exact_match"]["rule_ok"] == 1
    assert report["nelbo"]["before"]["eval_nelbo"] > 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    shutil.rmtree(tmp_path / "out")
