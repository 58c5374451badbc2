import pickle

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_tune.data import DiffusionCollator, StreamSampler, UnpairedMixture, answers_without_prompts


def paired_rows(count, prompt_length=2):
    rows = []
    for index in range(count):
        prompt, answer = [100 + index] * (prompt_length + index % 3), [10 + index, 11 + index]
        labels = [-100] * len(prompt) + answer
        rows.append({"input_ids": prompt + answer, "labels": labels, "row_index": index})
    return Dataset.from_list(rows)


def text_rows(count):
    rows = [[1000 + index] * (1 + index % 4) for index in range(count)]
    return Dataset.from_list([{"input_ids": ids, "labels": ids, "row_index": i} for i, ids in enumerate(rows)])


def mixture(num_paired=7, num_text=5, fraction=0.4, **arguments):
    return UnpairedMixture(
        paired_rows(num_paired), text_rows(num_text), **({"seed": 0} | arguments), fraction=fraction
    )


@settings(max_examples=200, deadline=None)
@given(
    fraction=st.one_of(
        st.sampled_from([0.1, 0.25, 0.3, 0.5, 2 / 3, 0.9]),
        st.floats(0.001, 0.999).map(lambda value: round(value, 6)),
    ),
    start=st.integers(0, 10**7),
    length=st.integers(1, 3000),
)
def test_every_window_holds_the_fraction_to_one_row(fraction, start, length):
    mix = mixture(fraction=fraction)
    count = (
        mix.place(start + length)[1] if mix.place(start + length)[0] else start + length - mix.place(start + length)[1]
    )
    before = mix.place(start)[1] if mix.place(start)[0] else start - mix.place(start)[1]
    assert abs((count - before) - fraction * length) < 1 + 1e-6


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.83])
def test_places_count_each_kind(fraction):
    mix = mixture(fraction=fraction)
    seen = {True: 0, False: 0}
    for position in range(300):
        is_unpaired, number = mix.place(position)
        assert number == seen[is_unpaired]
        seen[is_unpaired] += 1
    assert abs(seen[True] - 300 * fraction) < 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_pass_takes_every_row_once(shuffle):
    mix = mixture(num_paired=7, num_text=5, fraction=0.4, shuffle=shuffle)
    rows = mix.__getitems__(list(range(200)))
    paired = [row["row_index"] for row in rows if not row["is_unpaired"]]
    texts = [row["labels"][-1] for row in rows if row["is_unpaired"]]
    for start in range(0, 7 * (len(paired) // 7), 7):
        assert sorted(paired[start : start + 7]) == list(range(7))
    for start in range(0, 5 * (len(texts) // 5), 5):
        assert sorted(texts[start : start + 5]) == list(range(1000, 1005))
    is_in_order = paired[:7] == list(range(7)) and paired[7:14] == list(range(7))
    assert is_in_order == (not shuffle)
    if shuffle:  # another order in each pass
        assert paired[:7] != paired[7:14]


def test_an_unpaired_row_is_a_text_behind_a_prompt_with_noise_of_its_own():
    rows = [row for row in map(mixture(num_paired=30).__getitem__, range(300)) if row["is_unpaired"]]
    keys = [row["row_index"] for row in rows]
    assert len(set(keys)) == len(keys)
    assert min(keys) >= 30
    prompts = set()
    for row in rows:
        text = [label for label in row["labels"] if label != -100]
        start = len(row["labels"]) - len(text)
        assert row["labels"] == [-100] * start + text
        assert row["input_ids"][start:] == text == [text[0]] * (1 + (text[0] - 1000) % 4)
        donor = row["input_ids"][0] - 100
        assert row["input_ids"][:start] == [100 + donor] * (2 + donor % 3)
        prompts.add(donor)
    assert prompts == set(range(30))


def test_prompts_leave_room_for_the_text():
    rows = [row for row in map(mixture(max_length=4).__getitem__, range(100)) if row["is_unpaired"]]
    assert max(len(row["input_ids"]) for row in rows) == 4
    for row in rows:
        text = [label for label in row["labels"] if label != -100]
        assert len(text) == 1 + (text[0] - 1000) % 4  # whole


def test_the_order_depends_on_the_seed_only():
    rows = mixture().__getitems__(list(range(50)))
    late = mixture()
    assert [late[position] for position in reversed(range(50))] == rows[::-1]
    assert pickle.loads(pickle.dumps(late))[49] == rows[49]
    assert mixture(seed=1).__getitems__(list(range(50))) != rows


def test_epochs_follow_one_another():
    epoch = 0
    mix = mixture(num_paired=6, fraction=0.25)
    sampler = StreamSampler(mix, epoch=lambda: epoch)
    first = list(sampler)
    epoch = 1
    assert [*first, *sampler] == list(range(16))
    assert len(sampler) == len(mix) == 8


def test_a_tiny_data_set_keeps_its_fraction_over_epochs():
    mix = mixture(num_paired=1, fraction=0.1)
    kinds = [mix[position]["is_unpaired"] for position in range(1000)]
    assert sum(kinds) == 100


def test_the_collator_marks_unpaired_rows():
    rows = mixture().__getitems__([0, 1, 2, 3, 4])
    batch = DiffusionCollator(pad_token_id=0, eos_token_id=1)(rows)
    assert batch["is_unpaired"].tolist() == [row["is_unpaired"] for row in rows]
    assert 0 < batch["is_unpaired"].sum() < 5
    assert "is_unpaired" not in DiffusionCollator(pad_token_id=0, eos_token_id=1)(list(paired_rows(3)))


def test_what_a_template_puts_before_a_text_is_left_out():
    rows = Dataset.from_list([{"input_ids": [7, 8, 9, 3], "labels": [-100, -100, 9, 3], "extra": 1}])
    assert answers_without_prompts(rows)[0] == {"input_ids": [9, 3], "labels": [9, 3]}


def test_one_pass_holds_the_rows_of_the_first_epoch():
    stream = mixture(max_length=6)
    rows = stream.one_pass()
    assert len(rows) == len(stream)
    expected = [{name: stream[place][name] for name in ("input_ids", "labels")} for place in range(len(stream))]
    assert list(rows) == expected
