import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlm_tune.diffusion import (
    LOSS_WEIGHTINGS,
    MASKINGS,
    NOISE_SCHEDULES,
    NORMALIZATIONS,
    TIMESTEP_SAMPLERS,
    NoiseStream,
    corrupt,
    count_items,
    counter_uniform,
    loss_weights,
    polynomial,
    random_lengths,
    token_weights,
)
from tests.diffusion.exact import count_edges

MASK_ID = 99
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", NOISE_SCHEDULES)


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
    schedule=st.sampled_from(list(NOISE_SCHEDULES)),
    seed=st.integers(0, 1000),
)
def test_only_targets_are_masked(targets, t, masking, schedule, seed):
    target_mask = torch.tensor(targets)
    timesteps = torch.full((len(targets),), t, dtype=torch.float64)
    input_ids, noisy = noisy_rows(target_mask, timesteps, masking, seed, schedule=schedule)
    assert not (noisy.masked & ~target_mask).any()
    assert torch.equal(noisy.noisy_input_ids == MASK_ID, noisy.masked)
    assert torch.equal(noisy.noisy_input_ids[~noisy.masked], input_ids[~noisy.masked])
    assert noisy.weights.isfinite().all()
    empty = ~target_mask.any(1)
    assert (noisy.weights[empty] == 0).all()
    if masking == "exact_count":
        assert torch.equal(noisy.masked.any(1), ~empty), "exact_count never draws an empty mask"
        assert (noisy.weights[~empty] > 0).all()


@given(t=st.floats(0, 1, exclude_max=True), total=st.integers(1, 12))
@example(t=1 / 3, total=3)
def test_exact_count_masks_the_drawn_number(t, total):
    target_mask = torch.arange(12)[None] < total
    _, noisy = noisy_rows(target_mask, torch.tensor([t], dtype=torch.float64), "exact_count")
    count = int(noisy.masked.sum())
    # `1 - (1 - t)` as the schedule rounds it: at t = 1 / 3, `3 t` rounds to 1 and this does not
    assert count == min(math.floor((1 - (1 - t)) * total) + 1, total)
    assert noisy.weights.item() == pytest.approx(total / count, rel=1e-12)


@EVERY_SCHEDULE
@pytest.mark.parametrize("total", [1, 2, 7])
def test_exact_count_is_unbiased_for_every_schedule(schedule, total):
    """Over a fine grid of t, `weight * f(count)` averages to `sum_l f(l) / l` for any f: here f = l**2."""
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    target_mask = torch.ones(len(grid), total, dtype=torch.bool)
    _, noisy = noisy_rows(target_mask, grid, "exact_count", schedule=schedule)
    counts = noisy.masked.sum(1).double()
    expected = sum(count for count in range(1, total + 1))
    assert (noisy.weights * counts**2).mean().item() == pytest.approx(expected, rel=1e-4)


@EVERY_SCHEDULE
def test_weights_are_those_of_the_counts_that_are_drawn(schedule):
    """For A in 1..40: `1 / (l weight)` is the length of the interval of t in which `l` tokens are masked.

    The intervals are found by bisection on what `corrupt` does, so nothing here uses the inverse of alpha.
    """
    for total in range(1, 41):
        edges = count_edges(NOISE_SCHEDULES[schedule], total)
        drawn = edges.diff()
        assert (drawn > 0).all(), "every count can be drawn"
        middles = (edges[1:] + edges[:-1]) / 2
        _, noisy = noisy_rows(torch.ones(total, total, dtype=torch.bool), middles, "exact_count", schedule=schedule)
        counts = torch.arange(1, total + 1, dtype=torch.float64)
        assert torch.equal(noisy.masked.sum(1), counts.long())
        probability = 1 / (counts * noisy.weights)
        torch.testing.assert_close(probability, drawn, rtol=0, atol=1e-10)
        assert probability.sum().item() == pytest.approx(1, abs=1e-11)


@EVERY_SCHEDULE
def test_drawn_counts_follow_their_law(schedule):
    """Chi-square of the counts of 20,000 rows against `1 / (l weight)`; 99.99 % quantile of 11 degrees of freedom."""
    rows, total = 20_000, 12
    timesteps = counter_uniform(0, NoiseStream.TIMESTEP, torch.arange(rows))
    _, noisy = noisy_rows(torch.ones(rows, total, dtype=torch.bool), timesteps, "exact_count", schedule=schedule)
    counts = noisy.masked.sum(1)
    observed = torch.bincount(counts, minlength=total + 1)[1:].double()
    probability = torch.stack([1 / (count * noisy.weights[counts == count][0]) for count in range(1, total + 1)])
    assert ((observed - rows * probability) ** 2 / (rows * probability)).sum() < 37.4


@pytest.mark.parametrize("schedule", [*NOISE_SCHEDULES.values(), polynomial(0.2)])
def test_exact_count_of_very_long_rows_has_finite_weights(schedule):
    """Also with more tokens than 1 / sigma_min of the geometric schedule, at both ends of t."""
    timesteps = torch.tensor([0.0, 1e-9, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    noisy = corrupt(
        torch.zeros(4, 200_000, dtype=torch.long),
        torch.ones(4, 200_000, dtype=torch.bool),
        timesteps,
        torch.arange(200_000, dtype=torch.float64).expand(4, -1) / 200_000,
        schedule=schedule,
        masking="exact_count",
        mask_token_id=MASK_ID,
    )
    counts = noisy.masked.sum(1)
    assert (counts.diff() >= 0).all()
    assert counts[0] == 1
    assert counts[-1] == 200_000
    assert noisy.weights.isfinite().all()
    assert (noisy.weights > 0).all()


@EVERY_SCHEDULE
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_bernoulli_counts_are_binomial(schedule, t):
    """Chi-square of the counts of 20,000 rows of 8 tokens; cells of expectation below 5 are joined."""
    rows, length, epsilon = 20_000, 8, 1e-3
    _, noisy = noisy_rows(
        torch.ones(rows, length, dtype=torch.bool),
        torch.full((rows,), t, dtype=torch.float64),
        "bernoulli",
        schedule=schedule,
    )
    moved = torch.tensor(epsilon + (1 - epsilon) * t, dtype=torch.float64)
    p = 1 - NOISE_SCHEDULES[schedule].alpha(moved).item()
    expected = torch.tensor([rows * math.comb(length, k) * p**k * (1 - p) ** (length - k) for k in range(length + 1)])
    observed = torch.bincount(noisy.masked.sum(1), minlength=length + 1).double()
    joined = expected >= 5
    statistic = ((observed - expected)[joined] ** 2 / expected[joined]).sum()
    rest = expected[~joined].sum()
    if rest > 0:
        statistic += (observed[~joined].sum() - rest) ** 2 / rest.clamp(min=1)
    assert statistic < 31.8, "99.99 % quantile of chi-square with 8 degrees of freedom"
    assert noisy.weights[0] == NOISE_SCHEDULES[schedule].weight(moved)


@EVERY_SCHEDULE
@pytest.mark.parametrize("masking", MASKINGS)
@settings(max_examples=20)
@given(low=st.floats(0, 0.99), high=st.floats(0, 0.99))
def test_masked_sets_are_nested_in_t(masking, schedule, low, high):
    low, high = sorted((low, high))
    target_mask = torch.ones(4, 16, dtype=torch.bool)
    less, more = (
        noisy_rows(target_mask, torch.full((4,), t, dtype=torch.float64), masking, schedule=schedule)[1]
        for t in (low, high)
    )
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


def test_no_value_is_read_back_from_the_device():
    """On the meta device there are shapes and no values: `.item()`, `nonzero` and the like would raise."""
    with torch.device("meta"):
        input_ids, row_index = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, dtype=torch.long)
        target_mask = torch.ones(3, 8, dtype=torch.bool)
    positions = target_mask.cumsum(dim=1) - 1
    lengths = random_lengths(0, 1, row_index, target_mask.sum(dim=1), 0.5)
    timesteps = [sampler(0, 5, row_index, 3) for sampler in TIMESTEP_SAMPLERS.values()]
    for schedule, masking in itertools.product(NOISE_SCHEDULES.values(), MASKINGS):
        noisy = corrupt(
            input_ids,
            target_mask & (positions < lengths[:, None]),
            timesteps[0],
            counter_uniform(0, NoiseStream.MASK, 1, row_index[:, None], positions),
            schedule=schedule,
            masking=masking,
            mask_token_id=MASK_ID,
        )
    for weighting, normalization in itertools.product(LOSS_WEIGHTINGS, NORMALIZATIONS):
        weights = token_weights(noisy, target_mask, target_mask, weighting)
        num_items = count_items(target_mask, normalization)
        assert loss_weights(weights, target_mask, normalization, num_items).shape == (3, 8)
