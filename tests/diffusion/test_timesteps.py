import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlm_tune.diffusion import TIMESTEP_SAMPLERS
from dlm_tune.diffusion.timesteps import stratified


@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**6), num_slots=st.integers(1, 200))
def test_every_stratum_is_hit_once(seed, step, num_slots):
    timesteps = stratified(seed, step, torch.arange(num_slots), num_slots)
    assert (timesteps * num_slots).long().sort().values.tolist() == list(range(num_slots))


@pytest.mark.parametrize("sample", TIMESTEP_SAMPLERS.values(), ids=TIMESTEP_SAMPLERS.keys())
@pytest.mark.parametrize(("world_size", "microbatches", "batch_size"), [(1, 1, 16), (2, 2, 4), (4, 4, 1), (8, 1, 2)])
def test_same_timesteps_for_any_cut_of_the_global_batch(sample, world_size, microbatches, batch_size):
    whole = sample(3, 11, torch.arange(16), 16)
    parts = []
    for microstep in range(microbatches):
        for rank in range(world_size):
            slots = (microstep * world_size + rank) * batch_size + torch.arange(batch_size)
            parts.append(sample(3, 11, slots, 16))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("sample", TIMESTEP_SAMPLERS.values(), ids=TIMESTEP_SAMPLERS.keys())
def test_each_slot_is_uniform_over_steps(sample):
    """Mean 1/2 and variance 1/12 in every slot: no slot keeps seeing one noise level."""
    drawn = torch.stack([sample(0, step, torch.arange(8), 8) for step in range(4000)])
    assert ((drawn.mean(0) - 0.5).abs() < 4 * (1 / 12 / 4000) ** 0.5).all()
    assert ((drawn.var(0) - 1 / 12).abs() < 4 * (1 / 180 / 4000) ** 0.5).all()


def test_jitter_is_uniform_within_strata_and_independent_of_them():
    """`8 t` = stratum + jitter: the jitter's mean, variance, correlation with the stratum and with its neighbour's."""
    drawn = torch.stack([stratified(0, step, torch.arange(8), 8) for step in range(2000)]) * 8
    stratum, jitter = drawn.floor(), drawn % 1
    n = jitter.numel()
    assert abs(jitter.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(jitter.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    for one, other in ((jitter, stratum), (jitter[:, :-1], jitter[:, 1:])):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 4 / n**0.5
