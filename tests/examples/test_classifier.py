"""The example of guidance by a classifier: what it counts, and a run in small."""

import json
import sys

import classifier as example
import pytest


def test_forms_of_pronunciations():
    for text in ("tremble: t r eh m b ah l", "a: ah", "o'neil: ow n iy l"):
        assert example.PRONUNCIATION.fullmatch(text)
    for text in ("rambled ramblers", "ouke:", "dorndur: d o r  n d er iy", "smer: sh merr", "d: l: w"):
        assert not example.PRONUNCIATION.fullmatch(text)


def test_a_row_of_the_table_counts_kind_and_form():
    texts = ["a: ah", "a: ahhh", "words of text", "words of text"]
    assert example.table_row("x", texts, 3.2) == "| x | 0.50 ± 0.25 | 0.25 ± 0.22 | 0.75 | 3 |"


@pytest.mark.slow
def test_a_small_run_writes_its_table(tmp_path, monkeypatch, capsys):
    lines = ["tremble: t r eh m b ah l", "rambled ramblers rambles"] * 20
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    monkeypatch.setattr(example, "DATA", data)
    output_file = tmp_path / "out" / "table.md"
    flags = ["--train_steps", "2", "--num_lines", "1", "--scales", "2", "--output_file", str(output_file)]
    monkeypatch.setattr(sys, "argv", ["classifier.py", *flags])
    example.main()
    rows = [line.split("|")[1].strip() for line in output_file.read_text().splitlines()]
    assert rows[2:] == [
        "none",
        "none, cut to the best 8 tokens",
        "method exact, top_k 8, scale 2",
        "method first_order, scale 2",
    ]
    assert "accuracy with 50% masked" in capsys.readouterr().out


def test_missing_data_name_their_command(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "DATA", tmp_path / "none.jsonl")
    with pytest.raises(SystemExit, match=r"inflection_data\.py --pretraining"):
        example.read_lines(None, 10)
