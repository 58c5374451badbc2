"""Checks on tokenised rows against a plain per-row description, and the messages of each fault."""

import logging
import time

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlm_tune.data import check_rows

MASK = 99


def make(*rows):
    """A data set of (input_ids, labels) pairs; labels None means that every token is a target."""
    return Dataset.from_dict(
        {
            "input_ids": [list(ids) for ids, _ in rows],
            "labels": [list(ids) if labels is None else list(labels) for ids, labels in rows],
        }
    )


def check(dataset, **options):
    defaults = {"mask_token_id": MASK, "max_length": None, "invalid_rows": "error", "overlong_rows": "error"}
    return check_rows(dataset, **(defaults | {"first_target_position": 0, "name": "train"} | options))


def plain(ids, labels, options):
    """Return the rows that one row becomes, or None where it is left out; a direct reading of the rules."""
    first = options["first_target_position"]
    limit = options["max_length"]
    if not ids or len(ids) != len(labels) or MASK in ids:
        return None
    if any(label not in (-100, token) for token, label in zip(ids, labels, strict=True)):
        return None
    labels = [-100 if position < first else label for position, label in enumerate(labels)]
    if all(label == -100 for label in labels):
        return None
    if limit is None or len(ids) <= limit:
        return [(ids, labels)]
    if options["overlong_rows"] == "drop":
        return None
    if options["overlong_rows"] == "truncate":
        return [(ids[:limit], labels[:limit])] if any(label != -100 for label in labels[:limit]) else None
    if any(label == -100 for label in labels[first:]):
        return None
    windows, start = [], 0
    while start == 0 or start + first < len(ids):
        window = ids[start : start + limit]
        windows.append((window, [-100] * first + window[first:]))
        start += limit - first
    return windows


row_strategy = st.lists(st.tuples(st.sampled_from([1, 2, 3, MASK]), st.sampled_from("tttc")), max_size=11).map(
    lambda row: ([token for token, _ in row], [token if kind == "t" else -100 for token, kind in row])
)
clean_row = st.lists(st.integers(1, 9), min_size=1, max_size=11).map(lambda ids: (ids, list(ids)))


@given(
    batch=st.lists(st.one_of(row_strategy, clean_row), min_size=1, max_size=6),
    max_length=st.sampled_from([None, 2, 3, 5]),
    overlong_rows=st.sampled_from(["drop", "truncate", "split"]),
    first_target_position=st.integers(0, 1),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_row_is_kept_cut_split_or_left_out_as_described(batch, **options):
    expected = [window for ids, labels in batch for window in plain(ids, labels, options) or []]
    dataset = make(([7, 8], None), *batch)  # one good row, so that something is always left
    result = check(dataset, invalid_rows="drop", **options)
    windows = [(row["input_ids"], row["labels"]) for row in result]
    good = ([7, 8], [-100, 8] if options["first_target_position"] else [7, 8])
    assert windows == [good, *expected]
    assert result["row_index"][:] == list(range(len(windows)))


@given(length=st.integers(1, 40), max_length=st.integers(2, 9), first=st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_split_makes_each_token_a_target_exactly_once(length, max_length, first):
    ids = list(range(100, 100 + length))
    result = check(
        make(([1, 2], None), (ids, None)),
        max_length=max_length,
        overlong_rows="split",
        invalid_rows="drop",
        first_target_position=first,
    )
    targets = [label for row in result for label in row["labels"] if label >= 100]
    assert targets == ids[first:]
    assert max(len(row["input_ids"]) for row in result) <= max_length


GOOD = ([1, 2], [-100, 2])


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        (([], []), {}, "row 1: no tokens"),
        (([1, MASK, 3], None), {}, r"row 1: the mask token \(id 99\) is inside the data: at position 1"),
        (([1, 2], [-100, -100]), {}, "row 1: no target: every label is -100"),
        (([1, 2], [-100]), {}, "row 1: `labels` and `input_ids` differ in length: 1 labels"),
        (
            ([1, 2, 3], [-100, 3, 4]),
            {},
            "row 1: a label is neither -100 nor the token at its own position.*position 1",
        ),
        (([1, 500], None), {"vocab_size": 128}, r"outside the vocabulary \(the vocabulary has 128\): at position 1"),
        (([1, -3], None), {}, "a token id outside the vocabulary: at position 1"),
        (([1, 2], [1, -100]), {"first_target_position": 1}, "the only target is position 0"),
        (([1] * 5, None), {"max_length": 4}, r"longer than max_length=4: 5 tokens(.|\n)*`overlong_rows`"),
        (
            ([1] * 6, [-100] * 5 + [1]),
            {"max_length": 4, "overlong_rows": "truncate"},
            r"the prompt alone fills max_length=4.*the prompt has 5 tokens(.|\n)*raise `max_length`",
        ),
        (
            ([1] * 6, [-100] + [1] * 5),
            {"max_length": 4, "overlong_rows": "split"},
            "longer than max_length=4 and not all targets, so it cannot be split",
        ),
    ],
)
def test_bad_rows_are_named_with_reason_and_remedy(row, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        check(make(GOOD, row), **options)
    assert "1 of 2 rows of the train data set cannot be used" in str(caught.value)
    assert "`invalid_rows: drop`" in str(caught.value) or "`overlong_rows`" in str(caught.value)


def test_the_message_shows_five_rows_and_counts_all():
    rows = [GOOD] + [([MASK], None)] * 7 + [([], [])] * 2
    with pytest.raises(ValueError, match="9 of 10 rows of the eval data set") as caught:
        check(make(*rows), name="eval")
    message = str(caught.value)
    assert "7 x the mask token" in message
    assert "2 x no tokens" in message
    assert [line.split(":")[0].strip() for line in message.splitlines() if line.startswith("  row")] == [
        f"row {number}" for number in range(1, 6)
    ]


def test_dropped_rows_are_counted_in_the_log(caplog):
    with caplog.at_level(logging.WARNING, logger="dlm_tune"):
        result = check(make(GOOD, ([MASK], None), GOOD), invalid_rows="drop")
    assert len(result) == 2
    assert "Left out 1 of 3 rows of the train data set: 1 x the mask token" in caplog.text


def test_cut_rows_are_counted_in_the_log(caplog):
    with caplog.at_level(logging.WARNING, logger="dlm_tune"):
        check(make(GOOD, ([1] * 9, None)), max_length=4, overlong_rows="truncate")
    assert "Cut the end of 1 of 2 rows" in caplog.text


def test_no_row_left_is_an_error_even_when_dropping():
    with pytest.raises(ValueError, match="No row would be left"):
        check(make(([MASK], None)), invalid_rows="drop")


def test_no_rows_at_all():
    with pytest.raises(ValueError, match="the train data set has no rows"):
        check(make(GOOD).select([]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overlong_rows": "trunkate"}, "overlong_rows='trunkate' is unknown.*Did you mean 'truncate'"),
        ({"invalid_rows": "skip"}, "invalid_rows='skip' is unknown: choose 'error' or 'drop'"),
        ({"max_length": 1, "first_target_position": 1}, "max_length=1 leaves no position for a target"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words):
        check(make(GOOD), **options)


def test_a_column_of_text_is_not_token_ids():
    with pytest.raises(ValueError, match="column 'labels' must hold a list of token ids"):
        check(Dataset.from_dict({"input_ids": [[1]], "labels": ["a"]}))


def test_other_columns_go_and_types_stay():
    rows = make(GOOD, GOOD).add_column("lemma", ["a", "b"])
    result = check(rows)
    assert result.column_names == ["input_ids", "labels", "row_index"]
    assert result.features["input_ids"] == rows.features["input_ids"]
    assert result.format["type"] is None


def test_forty_thousand_rows_take_seconds():
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 90, size) for size in generator.integers(5, 60, 40_000)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    start = time.process_time()
    assert len(check(rows, max_length=50, overlong_rows="split")) > 40_000
    assert time.process_time() - start < 10
