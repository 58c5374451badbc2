"""The collator against a plain per-row description of each policy, and its invariants on random rows."""

import time

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_tune.data import DiffusionCollator

PAD, EOS, END_OF_TURN = 90, 91, 92
POLICIES = ("one", "pad_to_block", "pad_to_max", "none")


@st.composite
def rows(draw):
    """A row: context, then runs of targets and context; tokens include EOS and end of turn, anywhere."""
    length = draw(st.integers(1, 12))
    input_ids = draw(st.lists(st.sampled_from([3, 4, 5, PAD, EOS, END_OF_TURN]), min_size=length, max_size=length))
    targets = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    return {
        "input_ids": input_ids,
        "labels": [token if target else -100 for token, target in zip(input_ids, targets, strict=True)],
        "row_index": draw(st.integers(0, 10**6)),
    }


@st.composite
def settings_of_collator(draw):
    policy = draw(st.sampled_from(POLICIES))
    return {
        "eos_policy": policy,
        "block_length": draw(st.integers(1, 6)) if policy == "pad_to_block" else None,
        "pad_to_multiple_of": draw(st.sampled_from([None, 1, 4, 7])),
        "padding_side": draw(st.sampled_from(["left", "right"])),
        "max_length": draw(st.sampled_from([None, 12, 14])),
        "end_of_turn_ids": draw(st.sampled_from([(), (END_OF_TURN,)])),
    }


def expected_row(row, options, longest=None):
    """Return (tokens, targets, number of filling EOS) of one row, in words of the policy; no vector arithmetic."""
    tokens, targets = list(row["input_ids"]), [label != -100 for label in row["labels"]]
    limit = options["max_length"] or 10**9
    filling = 0
    if options["eos_policy"] == "none" or not targets[-1]:
        return tokens, targets, 0
    ends = {EOS, *options["end_of_turn_ids"]}
    has_ended = any(token in ends and target for token, target in list(zip(tokens, targets, strict=True))[-2:])
    if not has_ended and len(tokens) < limit:
        tokens.append(EOS)
        targets.append(True)
    while len(tokens) < limit:
        answer = 0
        while answer < len(targets) and targets[-1 - answer]:
            answer += 1
        block = options["block_length"]
        needs_block = options["eos_policy"] == "pad_to_block" and answer % block
        needs_max = options["eos_policy"] == "pad_to_max" and len(tokens) < (longest or 0)
        if not (needs_block or needs_max):
            break
        tokens.append(EOS)
        targets.append(True)
        filling += 1
    return tokens, targets, filling


@given(batch=st.lists(rows(), min_size=1, max_size=5), options=settings_of_collator())
@settings(max_examples=300, deadline=None)
def test_a_batch_is_its_rows_ended_as_the_policy_says_and_padded(batch, options):
    longest = max(len(expected_row(row, options)[0]) for row in batch)
    result = DiffusionCollator(PAD, EOS, **options)(batch)

    assert result["row_index"].tolist() == [row["row_index"] for row in batch]
    size = result["input_ids"].shape[1]
    multiple = options["pad_to_multiple_of"] or 1
    assert size % multiple == 0
    full_lengths = []
    for index, row in enumerate(batch):
        tokens, targets, filling = expected_row(row, options, longest)
        full_lengths.append(len(tokens))
        content = slice(0, len(tokens)) if options["padding_side"] == "right" else slice(size - len(tokens), size)
        assert result["input_ids"][index, content].tolist() == tokens
        assert result["target_mask"][index, content].tolist() == targets
        filled = result["eos_padding_mask"][index, content].tolist()
        assert filled == [False] * (len(tokens) - filling) + [True] * filling
        padding = torch.ones(size, dtype=torch.bool)
        padding[content] = False
        assert (result["input_ids"][index, padding] == PAD).all()
        assert (result["attention_mask"][index] == (~padding).long()).all(), "attention exactly on content"
        assert not result["target_mask"][index, padding].any(), "padding is never a target"
        assert not result["eos_padding_mask"][index, padding].any()
    assert size - max(full_lengths) < multiple, "no padding beyond the longest row and the multiple"


@given(batch=st.lists(rows(), min_size=1, max_size=6), options=settings_of_collator())
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_or_counted_twice(batch, options):
    """Every token and every target of the rows is in the batch, in order, and only EOS comes on top."""
    result = DiffusionCollator(PAD, EOS, **options)(batch)
    attended, is_target = result["attention_mask"].bool(), result["target_mask"]
    assert (is_target & ~attended).sum() == 0
    for index, row in enumerate(batch):
        content = result["input_ids"][index][attended[index]].tolist()
        assert content[: len(row["input_ids"])] == row["input_ids"]
        added = content[len(row["input_ids"]) :]
        assert set(added) <= {EOS}
        own_targets = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert result["input_ids"][index][is_target[index]].tolist() == own_targets + added
        if options["max_length"]:
            assert len(content) <= max(options["max_length"], len(row["input_ids"]))


@pytest.mark.parametrize("policy", ["one", "pad_to_block", "none"])
@given(batch=st.lists(rows(), min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_its_batch_mates(policy, batch):
    collator = DiffusionCollator(PAD, EOS, policy, block_length=4 if policy == "pad_to_block" else None)
    together = collator(batch)
    for index, row in enumerate(batch):
        alone = collator([row])
        size = alone["input_ids"].shape[1]
        for key in ("input_ids", "attention_mask", "target_mask", "eos_padding_mask"):
            assert torch.equal(together[key][index, :size], alone[key][0])
            assert not together["attention_mask"][index, size:].any()


def test_only_pad_to_max_depends_on_batch_mates():
    short = {"input_ids": [3, 4], "labels": [-100, 4], "row_index": 0}
    long = {"input_ids": [3] * 6, "labels": [-100] + [3] * 5, "row_index": 1}
    batch = DiffusionCollator(PAD, EOS, "pad_to_max")([short, long])
    assert batch["input_ids"].tolist() == [[3, 4, EOS, EOS, EOS, EOS, EOS], [3, 3, 3, 3, 3, 3, EOS]]
    assert batch["target_mask"].sum(1).tolist() == [6, 6]
    assert batch["eos_padding_mask"].sum(1).tolist() == [4, 0]


@pytest.mark.parametrize(
    ("tail", "added"),
    [([3], 1), ([EOS], 0), ([END_OF_TURN], 0), ([END_OF_TURN, 4], 0), ([END_OF_TURN, 4, 4], 1)],
    ids=["open", "eos", "end of turn", "end of turn and line break", "end of turn further back"],
)
def test_one_ends_an_answer_once(tail, added):
    ids = [5, 6, *tail]
    row = {"input_ids": ids, "labels": [-100, *ids[1:]], "row_index": 0}
    batch = DiffusionCollator(PAD, EOS, end_of_turn_ids={END_OF_TURN})([row])
    assert batch["input_ids"].tolist() == [ids + [EOS] * added]


def test_an_end_inside_the_prompt_does_not_count():
    row = {"input_ids": [5, EOS, 6], "labels": [-100, -100, 6], "row_index": 0}
    assert DiffusionCollator(PAD, EOS)([row])["input_ids"].tolist() == [[5, EOS, 6, EOS]]


def test_a_row_that_fills_max_length_gets_no_eos():
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "row_index": 0}
    assert DiffusionCollator(PAD, EOS, max_length=3)([row])["input_ids"].tolist() == [[5, 6, 7]]


def test_block_counts_the_last_answer_only():
    """Two turns: the prompt and the first answer do not count towards the block."""
    row = {"input_ids": [5, 6, 7, 8, EOS], "labels": [-100, 6, -100, 8, EOS], "row_index": 0}
    batch = DiffusionCollator(PAD, EOS, "pad_to_block", block_length=3)([row])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, EOS, EOS]]


def test_a_batch_of_64_by_4096_takes_little_time():
    """No Python loop over tokens: 262,144 tokens as tensors in well under a tenth of a second."""
    ids = torch.arange(4096) % 80
    batch = [{"input_ids": ids, "labels": ids, "row_index": index} for index in range(64)]
    collator = DiffusionCollator(PAD, EOS)
    times = []
    for _ in range(5):
        start = time.process_time()
        collator(batch)
        times.append(time.process_time() - start)
    assert min(times) < 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eos_policy": "pad_to_blok"}, "eos_policy='pad_to_blok' is unknown.*Did you mean 'pad_to_block'"),
        ({"eos_policy": "pad_to_block"}, "`pad_to_block` needs a block_length"),
        ({"eos_policy": "one", "block_length": 32}, "the other policies take none"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be at least 1"),
        ({"padding_side": "both"}, "padding_side='both' is unknown: choose 'right' or 'left'"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words):
        DiffusionCollator(PAD, EOS, **options)


def test_missing_eos_token():
    with pytest.raises(ValueError, match="eos_token_id is missing: the tokenizer must define it"):
        DiffusionCollator(PAD, None)


def test_rows_that_were_not_checked():
    with pytest.raises(ValueError, match=r"no 'row_index'.*check_rows first"):
        DiffusionCollator(PAD, EOS)([{"input_ids": [1], "labels": [1]}])


def test_what_packing_does_not_go_with():
    row = {"input_ids": [1], "labels": [1], "row_index": 0}
    collator = DiffusionCollator(PAD, EOS, "pad_to_max", padding_side="left")
    words = r"eos_policy='pad_to_max' makes the length .* depend on the other rows.*padding_side='left' has no meaning"
    with pytest.raises(ValueError, match=words):
        collator([{"rows": [row]}])
    with pytest.raises(ValueError, match=words):
        collator.row_lengths(Dataset.from_list([row]))


def test_packed_keys_exist_only_where_rows_are_packed():
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "row_index": 4}
    short = {"input_ids": [8, 9], "labels": [-100, 9], "row_index": 2}
    collator = DiffusionCollator(PAD, EOS, pad_to_multiple_of=5)
    unpacked = collator([row, short])
    assert not {"packed_position", "packed_shape"} & set(unpacked)
    packed = collator([{"rows": [row, short]}, {"rows": [short]}])
    assert packed["packed_shape"] == (2, 10)
    padding = 20
    assert packed["packed_position"].tolist() == [[0, 1, 2, 3], [4, 5, 6, padding], [10, 11, 12, padding]]
    assert packed["row_index"].tolist() == [4, 2, 2]
