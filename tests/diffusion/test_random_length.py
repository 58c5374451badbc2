import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlm_tune.diffusion import random_lengths


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=20),
    probability=st.floats(0, 1),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 100),
)
def test_a_row_is_never_longer_nor_empty(lengths, probability, seed, epoch):
    before = torch.tensor(lengths)
    after = random_lengths(seed, epoch, torch.arange(len(lengths)), before, probability)
    assert after.dtype == torch.int64
    assert (after <= before).all()
    assert (after >= before.clamp(max=1)).all()


def test_probability_zero_changes_nothing_and_one_draws_uniformly():
    """Chi-square of 30,000 lengths of 10; 99.99 % quantile of 9 degrees of freedom."""
    rows, length = 30_000, 10
    before = torch.full((rows,), length)
    assert torch.equal(random_lengths(0, 0, torch.arange(rows), before, 0.0), before)
    counts = torch.bincount(random_lengths(0, 0, torch.arange(rows), before, 1.0), minlength=length + 1)
    assert counts[0] == 0
    assert ((counts[1:] - rows / length) ** 2 / (rows / length)).sum() < 33.7


def test_rate_of_cuts():
    """A share `probability * (1 - 1 / length)` of the rows gets shorter; which, does not depend on the new length."""
    rows, length, probability = 40_000, 1000, 0.25
    after = random_lengths(3, 1, torch.arange(rows), torch.full((rows,), length), probability)
    expected = probability * (1 - 1 / length)
    shorter = (after < length).double()
    assert abs(shorter.mean() - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5
    assert after[after < length].double().mean().item() == pytest.approx(length / 2, rel=0.03)


def test_a_row_keeps_its_length_in_any_batch_and_gets_another_in_each_epoch():
    rows, lengths = torch.arange(64), torch.full((64,), 1000)
    together = random_lengths(7, 2, rows, lengths, 0.5)
    alone = torch.cat([random_lengths(7, 2, rows[i : i + 1], lengths[i : i + 1], 0.5) for i in range(64)])
    assert torch.equal(together, alone)
    assert (random_lengths(7, 3, rows, lengths, 0.5) != together).double().mean() > 0.5
