"""Timesteps of the rows of a global batch.

Every sampler gives each row a timestep that is uniform on [0, 1), so all are unbiased; they differ in how the
timesteps of one optimiser step depend on each other. `slots` are the places of the rows in the global batch (all
processes, all microbatches), so that strata span the whole step: strata per process lose most of the gain.

Where timesteps depend on each other, slots are dealt to places by a permutation that is drawn anew at every step. So
the place of a row in the batch carries no information about its noise level (it would if batches are sorted by
length). A timestep depends on (seed, step, slot, num_slots) only, so any cut into processes and microbatches gives
the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dlm_tune.diffusion.noise import NoiseStream, counter_uniform

TimestepSampler = Callable[[int, int, Tensor, int], Tensor]


def uniform(seed: int, step: int, slots: Tensor, num_slots: int) -> Tensor:
    """Independent timesteps (LLaDA's training recipe).

    Args:
        seed: noise seed.
        step: optimiser step.
        slots: (R,) int64 places of the rows in the global batch, in [0, num_slots).
        num_slots: rows in a full global batch.

    Returns:
        (R,) float64 in [0, 1).
    """
    return counter_uniform(seed, NoiseStream.TIMESTEP, step, slots)


def stratified(seed: int, step: int, slots: Tensor, num_slots: int) -> Tensor:
    """One timestep in each of `num_slots` equal strata: `t = (place + u_slot) / num_slots`.

    Arguments and result as `uniform`. MDLM (arXiv 2406.07524, section 3.5); its code calls it "antithetic".
    """
    timesteps = (_places(seed, step, slots, num_slots) + uniform(seed, step, slots, num_slots)) / num_slots
    return timesteps.clamp(max=1 - 2.0**-53)  # the sum may round up to the end of the last stratum


def systematic(seed: int, step: int, slots: Tensor, num_slots: int) -> Tensor:
    """Equal distances from one random offset: `t = (u + place / num_slots) mod 1`.

    Arguments and result as `uniform`. VDM (arXiv 2107.00630, appendix I.1).
    """
    offset = counter_uniform(seed, NoiseStream.TIMESTEP, step, device=slots.device)
    return (offset + _places(seed, step, slots, num_slots).to(torch.float64) / num_slots) % 1.0


def antithetic(seed: int, step: int, slots: Tensor, num_slots: int) -> Tensor:
    """Pairs `u` and `1 - u`; the one row that an odd number leaves over is alone.

    Arguments and result as `uniform`.
    """
    places = _places(seed, step, slots, num_slots)
    first = counter_uniform(seed, NoiseStream.TIMESTEP, step, places // 2)
    # the mirror image on the grid of 53-bit fractions, whose largest is 1 - 2**-53: never 1 itself
    return torch.where(places % 2 == 0, first, 1 - 2.0**-53 - first)


def _places(seed: int, step: int, slots: Tensor, num_slots: int) -> Tensor:
    """(R,) int64, the place in [0, num_slots) of each slot: a random permutation of the slots of this step."""
    every_slot = torch.arange(num_slots, device=slots.device)
    return counter_uniform(seed, NoiseStream.TIMESTEP_ORDER, step, every_slot).argsort()[slots]


TIMESTEP_SAMPLERS: dict[str, TimestepSampler] = {
    "stratified": stratified,
    "systematic": systematic,
    "antithetic": antithetic,
    "uniform": uniform,
}
