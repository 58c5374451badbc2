import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlm_tune.diffusion import TIMESTEP_SAMPLERS
from dlm_tune.diffusion.timesteps import antithetic, stratified, systematic

EVERY_SAMPLER = pytest.mark.parametrize("sample", TIMESTEP_SAMPLERS.values(), ids=TIMESTEP_SAMPLERS.keys())


@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**6), num_slots=st.integers(1, 200))
def test_every_stratum_is_hit_once(seed, step, num_slots):
    timesteps = stratified(seed, step, torch.arange(num_slots), num_slots)
    assert (timesteps * num_slots).long().sort().values.tolist() == list(range(num_slots))


@EVERY_SAMPLER
@pytest.mark.parametrize(("world_size", "microbatches", "batch_size"), [(1, 1, 16), (2, 2, 4), (4, 4, 1), (8, 1, 2)])
def test_same_timesteps_for_any_cut_of_the_global_batch(sample, world_size, microbatches, batch_size):
    whole = sample(3, 11, torch.arange(16), 16)
    parts = []
    for microstep in range(microbatches):
        for rank in range(world_size):
            slots = (microstep * world_size + rank) * batch_size + torch.arange(batch_size)
            parts.append(sample(3, 11, slots, 16))
    assert torch.equal(torch.cat(parts), whole)


@EVERY_SAMPLER
@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**6), num_slots=st.integers(1, 50))
def test_timesteps_are_in_the_half_open_interval(sample, seed, step, num_slots):
    timesteps = sample(seed, step, torch.arange(num_slots), num_slots)
    assert timesteps.dtype == torch.float64
    assert ((timesteps >= 0) & (timesteps < 1)).all()


@EVERY_SAMPLER
@pytest.mark.parametrize("num_slots", [1, 5, 8])
def test_each_slot_is_uniform_over_steps(sample, num_slots):
    """Kolmogorov-Smirnov in every slot: no slot keeps seeing one noise level. 1.95: 0.1 % critical value."""
    steps = 2000
    drawn = torch.stack([sample(0, step, torch.arange(num_slots), num_slots) for step in range(steps)])
    grid = torch.arange(steps + 1, dtype=torch.float64)[:, None] / steps
    ordered = drawn.sort(dim=0).values
    distance = torch.maximum((ordered - grid[:-1]).abs(), (ordered - grid[1:]).abs()).amax(dim=0)
    assert (distance * steps**0.5 < 1.95).all()


@EVERY_SAMPLER
def test_steps_are_independent(sample):
    """Correlation of a slot's timestep with that of the same and of the next slot one step later."""
    drawn = torch.stack([sample(0, step, torch.arange(6), 6) for step in range(2000)])
    for later in (drawn[1:], drawn[1:].roll(1, dims=1)):
        pair = torch.stack([drawn[:-1].flatten(), later.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 4 / pair.shape[1] ** 0.5


@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**6), num_slots=st.integers(1, 60))
def test_antithetic_rows_are_mirror_images_in_pairs(seed, step, num_slots):
    timesteps = antithetic(seed, step, torch.arange(num_slots), num_slots)
    mirrored = 1 - 2.0**-53 - timesteps
    has_partner = (timesteps[:, None] == mirrored[None]).any(dim=1)
    assert has_partner.sum() == num_slots - num_slots % 2
    assert len(set(timesteps.tolist())) == num_slots


@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**6), num_slots=st.integers(1, 60))
def test_systematic_rows_are_at_equal_distances(seed, step, num_slots):
    timesteps = systematic(seed, step, torch.arange(num_slots), num_slots).sort().values
    torch.testing.assert_close(timesteps - timesteps[0], torch.arange(num_slots).double() / num_slots)
    assert timesteps[0] < 1 / num_slots


@pytest.mark.parametrize("sample", [antithetic, stratified, systematic])
def test_neighbouring_slots_share_nothing(sample):
    """Every pair of slots is dealt neighbouring strata, or mirror images, equally often: the permutation is fresh."""
    drawn = torch.stack([sample(0, step, torch.arange(8), 8) for step in range(2000)])
    correlation = torch.corrcoef(drawn.T)[~torch.eye(8, dtype=torch.bool)]
    assert (correlation - correlation.mean()).abs().max() < 4.5 / 2000**0.5
    assert correlation.mean() < -0.1, "dependent draws cover the interval better than independent ones"


def test_jitter_is_uniform_within_strata_and_independent_of_them():
    """`8 t` = stratum + jitter: the jitter's mean, variance, correlation with the stratum and with its neighbour's."""
    drawn = torch.stack([stratified(0, step, torch.arange(8), 8) for step in range(2000)]) * 8
    stratum, jitter = drawn.floor(), drawn % 1
    n = jitter.numel()
    assert abs(jitter.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(jitter.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    for one, other in ((jitter, stratum), (jitter[:, :-1], jitter[:, 1:])):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 4 / n**0.5
