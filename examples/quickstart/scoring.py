"""Scores of the quickstart: exact match and character errors, on pairs that the spelling rule gets right and wrong."""

import math
from dataclasses import dataclass

from inflection_data import hash_fraction, spelling_rule

from dlm_tune.evaluation.completions import edit_error_rate

KINDS = ("rule_fails", "rule_ok")


@dataclass
class Scores:
    """Exact match on each kind of pair and on all pairs, with standard errors, and the character error rate on all."""

    exact_match: dict[str, float]
    standard_error: dict[str, float]
    character_error_rate: float


def kind_of(row: dict) -> str:
    """Return "rule_fails" or "rule_ok"."""
    return KINDS[0] if row["rule_fails"] else KINDS[1]


def choose_rows(rows: list[dict], num_rule_fails: int | None, num_rule_ok: int | None) -> list[dict]:
    """Return the first so many rows of each kind (None: all), in the fixed random order of their prompts' hashes."""
    ordered = sorted(rows, key=lambda row: hash_fraction(row["prompt"]))
    fails, ok = ([row for row in ordered if kind_of(row) == kind] for kind in KINDS)
    return fails[:num_rule_fails] + ok[:num_rule_ok]


def rule_answer(prompt: str) -> str:
    """Return what the spelling rule says to "past of carry: "."""
    tag, _, lemma = prompt.removesuffix(": ").split(" ")
    return spelling_rule(lemma, tag)


def score(rows: list[dict], answers: list[str], population: list[dict]) -> Scores:
    """Score `answers`, one a row; "all" weighs the two kinds by their shares in `population`.

    Rule-failing pairs are few, so all of them are completed and only a sample of the others. The character error rate
    is edits per reference character, weighed likewise.
    """
    exact_match, standard_error = {}, {}
    mean = variance = edits = characters = 0.0
    for kind in KINDS:
        share = sum(kind_of(row) == kind for row in population) / len(population)
        pairs = [
            (answer, row["completion"]) for row, answer in zip(rows, answers, strict=True) if kind_of(row) == kind
        ]
        given, expected = [answer for answer, _ in pairs], [completion for _, completion in pairs]
        matches = sum(answer == completion for answer, completion in pairs) / len(pairs)
        exact_match[kind] = matches
        standard_error[kind] = math.sqrt(matches * (1 - matches) / len(pairs))
        mean += share * matches
        variance += (share * standard_error[kind]) ** 2
        mean_length = sum(map(len, expected)) / len(expected)
        edits += share * edit_error_rate(given, expected) * mean_length
        characters += share * mean_length
    exact_match["all"], standard_error["all"] = mean, math.sqrt(variance)
    return Scores(exact_match, standard_error, edits / characters)
