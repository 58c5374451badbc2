import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlm_tune.diffusion import MASKINGS, NOISE_SCHEDULES, NoiseStream, corrupt, counter_uniform

MASK_ID = 99


def noisy_rows(target_mask, timesteps, masking, seed=0, **kwargs):
    rows, length = target_mask.shape
    input_ids = torch.arange(rows * length).view(rows, length) % 50
    uniforms = counter_uniform(seed, NoiseStream.MASK, torch.arange(rows)[:, None], torch.arange(length))
    schedule = NOISE_SCHEDULES[kwargs.pop("schedule", "linear")]
    noisy = corrupt(
        input_ids,
        target_mask,
        timesteps,
        uniforms,
        schedule=schedule,
        masking=masking,
        mask_token_id=MASK_ID,
        **kwargs,
    )
    return input_ids, noisy


@given(
    targets=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=6),
    t=st.floats(0, 1, exclude_max=True),
    masking=st.sampled_from(MASKINGS),
    seed=st.integers(0, 1000),
)
def test_only_targets_are_masked(targets, t, masking, seed):
    target_mask = torch.tensor(targets)
    timesteps = torch.full((len(targets),), t, dtype=torch.float64)
    input_ids, noisy = noisy_rows(target_mask, timesteps, masking, seed)
    assert not (noisy.masked & ~target_mask).any()
    assert torch.equal(noisy.noisy_input_ids == MASK_ID, noisy.masked)
    assert torch.equal(noisy.noisy_input_ids[~noisy.masked], input_ids[~noisy.masked])
    assert noisy.weights.isfinite().all()
    empty = ~target_mask.any(1)
    assert (noisy.weights[empty] == 0).all()
    if masking == "exact_count":
        assert torch.equal(noisy.masked.any(1), ~empty), "exact_count never draws an empty mask"


@given(t=st.floats(0, 1, exclude_max=True), total=st.integers(1, 12))
@example(t=1 / 3, total=3)
def test_exact_count_masks_the_drawn_number(t, total):
    target_mask = torch.arange(12)[None] < total
    _, noisy = noisy_rows(target_mask, torch.tensor([t], dtype=torch.float64), "exact_count")
    count = int(noisy.masked.sum())
    # `1 - (1 - t)` as the schedule rounds it: at t = 1 / 3, `3 t` rounds to 1 and this does not
    assert count == min(math.floor((1 - (1 - t)) * total) + 1, total)
    assert noisy.weights.item() == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7])
def test_exact_count_is_unbiased_for_every_schedule(schedule, total):
    """Over a fine grid of t, `weight * f(count)` averages to `sum_l f(l) / l` for any f: here f = l**2."""
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    target_mask = torch.ones(len(grid), total, dtype=torch.bool)
    _, noisy = noisy_rows(target_mask, grid, "exact_count", schedule=schedule)
    counts = noisy.masked.sum(1).double()
    expected = sum(count for count in range(1, total + 1))
    assert (noisy.weights * counts**2).mean().item() == pytest.approx(expected, rel=1e-4)


def test_bernoulli_mask_rate_is_binomial():
    rows, length, t, epsilon = 4000, 50, 0.3, 1e-3
    _, noisy = noisy_rows(
        torch.ones(rows, length, dtype=torch.bool), torch.full((rows,), t, dtype=torch.float64), "bernoulli"
    )
    p = epsilon + (1 - epsilon) * t
    counts = noisy.masked.sum(1).double()
    assert abs(counts.mean() - length * p) < 4 * (length * p * (1 - p) / rows) ** 0.5
    assert counts.var().item() == pytest.approx(length * p * (1 - p), rel=0.1)
    assert noisy.weights[0].item() == pytest.approx(1 / p, rel=1e-12)


@pytest.mark.parametrize("masking", MASKINGS)
@settings(max_examples=30)
@given(low=st.floats(0, 0.99), high=st.floats(0, 0.99))
def test_masked_sets_are_nested_in_t(masking, low, high):
    low, high = sorted((low, high))
    target_mask = torch.ones(4, 16, dtype=torch.bool)
    _, less = noisy_rows(target_mask, torch.full((4,), low, dtype=torch.float64), masking)
    _, more = noisy_rows(target_mask, torch.full((4,), high, dtype=torch.float64), masking)
    assert not (less.masked & ~more.masked).any()


def test_exact_count_chooses_every_position_equally():
    rows, length = 20_000, 6
    _, noisy = noisy_rows(
        torch.ones(rows, length, dtype=torch.bool), torch.full((rows,), 0.2, dtype=torch.float64), "exact_count"
    )
    frequency = noisy.masked.double().mean(0)
    assert ((frequency - 2 / length).abs() < 4.5 * (1 / 3 * 2 / 3 / rows) ** 0.5).all()


def test_mask_token_in_the_data_is_not_taken_for_a_masked_position():
    input_ids = torch.tensor([[MASK_ID, 1, 2]])
    noisy = corrupt(
        input_ids,
        torch.tensor([[False, True, True]]),
        torch.tensor([0.0], dtype=torch.float64),
        torch.tensor([[0.0, 0.1, 0.2]], dtype=torch.float64),
        schedule=NOISE_SCHEDULES["linear"],
        masking="exact_count",
        mask_token_id=MASK_ID,
    )
    assert noisy.masked.tolist() == [[False, True, False]]


def test_unknown_masking_is_refused():
    with pytest.raises(ValueError, match="masking='half' is unknown: choose 'exact_count' or 'bernoulli'"):
        noisy_rows(torch.ones(1, 2, dtype=torch.bool), torch.tensor([0.5], dtype=torch.float64), "half")
