"""The plan against its definition and its bounds; packed batches against unpacked ones, on random rows."""

import pickle
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dlm_tune.data import DiffusionCollator, PackedRows, check_rows, document_ids, plan_packing, to_sequences
from dlm_tune.models.documents import document_position_ids
from tests.data.test_collator import EOS, PAD, rows
from tests.tiny_models import tiny_dream

MAX_LENGTH = 18  # rows of up to 12 tokens, one EOS, or EOS up to a multiple of 6


def best_fit_decreasing(lengths, max_length):
    """The textbook's loop over rows and sequences: the loads of the sequences."""
    loads = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, load in enumerate(loads) if load + length <= max_length]
        if fitting:
            loads[max(fitting, key=lambda index: loads[index])] += length
        else:
            loads.append(length)
    return sorted(loads)


def first_fit_decreasing(lengths, max_length):
    loads = []
    for length in sorted(lengths, reverse=True):
        for index, load in enumerate(loads):
            if load + length <= max_length:
                loads[index] += length
                break
        else:
            loads.append(length)
    return len(loads)


@st.composite
def packing_problems(draw):
    max_length = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, max_length), max_size=60)), max_length


@given(problem=packing_problems())
@settings(max_examples=300, deadline=None)
def test_plan_is_best_fit_decreasing(problem):
    lengths, max_length = problem
    plan = plan_packing(lengths, max_length)
    assert sorted(row for sequence in plan for row in sequence) == list(range(len(lengths))), "each row exactly once"
    assert all(list(sequence) == sorted(sequence) for sequence in plan), "rows ascending"
    loads = sorted(sum(lengths[row] for row in sequence) for sequence in plan)
    assert loads == best_fit_decreasing(lengths, max_length)
    assert all(0 < load <= max_length for load in loads)
    assert sum(load <= max_length / 2 for load in loads) <= 1, "two half-empty sequences would be one"
    assert len(plan) <= 11 / 9 * first_fit_decreasing(lengths, max_length) + 4
    again = plan_packing(np.array(lengths, dtype=np.int32), max_length)
    assert [sequence.tolist() for sequence in again] == [sequence.tolist() for sequence in plan]


def test_equal_rows_keep_their_order():
    assert [part.tolist() for part in plan_packing([3, 3, 3, 3, 3], 6)] == [[0, 1], [2, 3], [4]]


def test_planning_a_million_rows_takes_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 1_000_000), 1, 4096).astype(np.int64)
    start = time.process_time()
    plan = plan_packing(lengths, 4096)
    assert time.process_time() - start < 8
    assert lengths.sum() / (len(plan) * 4096) > 0.99


def test_rows_that_fit_nowhere_are_named():
    with pytest.raises(ValueError, match=r"rows 1 \(9 tokens\), 3 \(12 tokens\) are longer than max_length=8: raise"):
        plan_packing([8, 9, 3, 12], 8)
    with pytest.raises(ValueError, match=r"rows 0 \(0 tokens\) are empty"):
        plan_packing([0, 2], 8)
    with pytest.raises(ValueError, match=r"4 \(9 tokens\) and 3 more are longer"):
        plan_packing([9] * 8, 8)


def packed_rows(items, **options):
    """The random rows numbered 0, 1, ..., a collator, and their packed data set."""
    numbered = [row | {"row_index": index} for index, row in enumerate(items)]
    collator = DiffusionCollator(PAD, EOS, **options)
    dataset = Dataset.from_list(numbered)
    return numbered, collator, PackedRows(dataset, collator.row_lengths(dataset), MAX_LENGTH)


@st.composite
def collators(draw):
    policy = draw(st.sampled_from(["one", "pad_to_block", "none"]))
    return {
        "eos_policy": policy,
        "block_length": draw(st.integers(1, 6)) if policy == "pad_to_block" else None,
        "pad_to_multiple_of": draw(st.sampled_from([None, 1, 4, 7])),
        "max_length": draw(st.sampled_from([None, 12, 14])),
    }


@given(items=st.lists(rows(), min_size=1, max_size=12), options=collators(), order=st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_a_packed_batch_is_the_same_rows_laid_out_in_sequences(items, options, order):
    numbered, collator, packed = packed_rows(items, **options)
    indices = list(range(len(packed)))
    order.shuffle(indices)
    batch = collator(packed.__getitems__(indices))
    sequences = [packed.plan[index].tolist() for index in indices]
    assert batch["row_index"].tolist() == [row for sequence in sequences for row in sequence], "layout order"

    # the row view is that of the unpacked rows, up to its padding to a multiple
    unpacked = collator([numbered[index] for index in batch["row_index"]])
    size = batch["input_ids"].shape[1]
    assert not unpacked["attention_mask"][:, size:].any()
    for key in ("input_ids", "attention_mask", "target_mask", "eos_padding_mask"):
        assert torch.equal(batch[key], unpacked[key][:, :size])

    # each sequence is its rows one after the other, then padding
    laid_out = to_sequences(batch["input_ids"], batch, PAD)
    targets = to_sequences(batch["target_mask"], batch, False)
    ids = document_ids(batch)
    assert laid_out.shape == targets.shape == ids.shape == batch["packed_shape"]
    assert laid_out.shape[1] % (options["pad_to_multiple_of"] or 1) == 0
    number = 0
    for index, sequence in enumerate(sequences):
        tokens, marks, documents = [], [], []
        for _ in sequence:
            attended = batch["attention_mask"][number].bool()
            tokens += batch["input_ids"][number, attended].tolist()
            marks += batch["target_mask"][number, attended].tolist()
            number += 1
            documents += [number] * int(attended.sum())
        assert len(tokens) <= MAX_LENGTH
        padding = laid_out.shape[1] - len(tokens)
        assert laid_out[index].tolist() == tokens + [PAD] * padding
        assert targets[index].tolist() == marks + [False] * padding
        assert ids[index].tolist() == documents + [0] * padding

    # marked tokens in row-major order are the same list in both layouts
    assert torch.equal(laid_out[targets], batch["input_ids"][batch["target_mask"]])
    # positions restart, so they are the columns of the row view
    columns = torch.arange(size).expand_as(batch["input_ids"])
    positions = document_position_ids(ids)
    assert torch.equal(positions[ids > 0], columns[batch["attention_mask"].bool()])


@given(items=st.lists(rows(), min_size=1, max_size=12), options=collators())
@settings(max_examples=80, deadline=None)
def test_counts_add_up_over_an_epoch(items, options):
    """Tokens, targets and EOS of all packed batches are those of the rows on their own; no row is lost or repeated."""
    numbered, collator, packed = packed_rows(items, **options)
    alone = [collator([row]) for row in numbered]
    epoch = list(DataLoader(packed, batch_size=2, collate_fn=collator))
    assert sorted(index for batch in epoch for index in batch["row_index"].tolist()) == list(range(len(numbered)))
    for key in ("attention_mask", "target_mask", "eos_padding_mask"):
        assert sum(int(batch[key].sum()) for batch in epoch) == sum(int(batch[key].sum()) for batch in alone)
    for batch in epoch:
        attended = document_ids(batch) > 0
        assert int(attended.sum()) == int(batch["attention_mask"].sum())
        assert not (to_sequences(batch["target_mask"], batch, False) & ~attended).any()
    assert packed.max_rows == max(len(part) for part in packed.plan)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in alone)
    assert packed.efficiency == pytest.approx(tokens / (len(packed) * MAX_LENGTH))


@given(items=st.lists(rows(), min_size=1, max_size=12), options=collators())
@settings(max_examples=60, deadline=None)
def test_row_lengths_are_those_of_the_collated_rows(items, options):
    numbered, collator, _ = packed_rows(items, **options)
    expected = [int(collator([row])["attention_mask"].sum()) for row in numbered]
    assert collator.row_lengths(Dataset.from_list(numbered)).tolist() == expected


@given(
    items=st.lists(rows(), min_size=1, max_size=8),
    kept=st.lists(st.integers(1, 12), min_size=8, max_size=8),
    is_packed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_documents_follow_a_shortened_attention_mask(items, kept, is_packed):
    numbered, collator, packed = packed_rows(items)
    batch = collator(packed.__getitems__(range(len(packed)))) if is_packed else collator(numbered)
    before = document_ids(batch)
    columns = torch.arange(batch["input_ids"].shape[1])
    is_kept = columns < torch.tensor(kept[: len(numbered)])[:, None]
    batch["attention_mask"] = batch["attention_mask"] * is_kept
    assert torch.equal(document_ids(batch), before.where(to_sequences(is_kept, batch, False), 0))


def test_an_unpacked_batch_is_its_own_layout():
    row = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "row_index": 0}
    short = {"input_ids": [6], "labels": [-100], "row_index": 1}
    batch = DiffusionCollator(PAD, EOS, "none", padding_side="left")([row, short])
    assert to_sequences(batch["input_ids"], batch, PAD) is batch["input_ids"]
    assert document_ids(batch).tolist() == [[1, 1, 1], [0, 0, 2]]


def test_to_sequences_is_differentiable_and_keeps_the_type():
    _, collator, packed = packed_rows([{"input_ids": [3] * n, "labels": [3] * n} for n in (2, 5, 3)])
    batch = collator([packed[index] for index in range(len(packed))])
    values = torch.rand(batch["input_ids"].shape, requires_grad=True)
    to_sequences(values, batch, 0.0).sum().backward()
    assert torch.equal(values.grad, batch["attention_mask"].float())
    assert to_sequences(batch["target_mask"], batch, False).dtype == torch.bool


def test_items_survive_workers_and_single_access():
    _, collator, packed = packed_rows([{"input_ids": [3] * n, "labels": [3] * n} for n in (2, 5, 3, 12, 7)])
    assert packed[1] == packed.__getitems__([1])[0] == pickle.loads(pickle.dumps(packed))[1]
    loader = DataLoader(packed, batch_size=len(packed), collate_fn=collator, num_workers=1)
    assert sorted(next(iter(loader))["row_index"].tolist()) == [0, 1, 2, 3, 4]


def test_lengths_of_other_rows_are_refused():
    dataset = Dataset.from_list([{"input_ids": [3], "labels": [3], "row_index": 0}])
    with pytest.raises(ValueError, match=r"2 lengths were given for 1 rows.*collator.row_lengths"):
        PackedRows(dataset, [1, 1], 8)


def test_no_target_of_a_shifted_model_lies_at_the_start_of_a_document():
    """Such a target would have no predecessor; the checks of the rows remove it before they are packed."""
    generator = np.random.default_rng(0)
    tokens = [generator.integers(3, 80, size).tolist() for size in generator.integers(2, 40, 50)]
    dataset = check_rows(
        Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        mask_token_id=2,
        max_length=16,
        invalid_rows="drop",
        overlong_rows="split",
        first_target_position=1,
        name="train",
    )
    collator = DiffusionCollator(PAD, EOS, max_length=16)
    packed = PackedRows(dataset, collator.row_lengths(dataset), 16)
    batch = collator(packed.__getitems__(range(len(packed))))
    targets, ids = to_sequences(batch["target_mask"], batch, False), document_ids(batch)
    is_first = (document_position_ids(ids) == 0) & (ids > 0)
    assert int(is_first.sum()) == len(dataset) > len(packed)
    assert not (targets & is_first).any()
    assert torch.equal(targets, (ids > 0) & ~is_first), "every other token of plain text is one"


def test_scores_of_a_packed_batch_are_those_of_the_padded_rows():
    """The whole way: the collator's two layouts through a model with shifted logits, token by token."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for size in (9, 4, 12, 2, 7, 5):
        ids = torch.randint(3, 80, (size,), generator=generator).tolist()
        items.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    numbered, collator, packed = packed_rows(items, pad_to_multiple_of=4)
    batch = collator(packed.__getitems__(range(len(packed))))
    model = tiny_dream()
    with torch.no_grad():
        scores = model(
            input_ids=to_sequences(batch["input_ids"], batch, PAD),
            document_ids=document_ids(batch),
            target_ids=to_sequences(batch["input_ids"], batch, PAD),
            target_mask=to_sequences(batch["target_mask"], batch, False),
        )
        padded = collator([numbered[index] for index in batch["row_index"]])
        arguments = {key: padded[key] for key in ("input_ids", "attention_mask", "target_mask")}
        expected = model(target_ids=padded["input_ids"], **arguments)
    torch.testing.assert_close(scores.token_nll, expected.token_nll, rtol=0, atol=1e-5)
    assert torch.equal(scores.is_top1, expected.is_top1)
