"""Timesteps of the rows of a global batch.

Every sampler gives each row a timestep that is uniform on [0, 1), so all are unbiased; they differ in how the
timesteps of one optimiser step depend on each other. `slots` are the places of the rows in the global batch (all
processes, all microbatches), so that strata span the whole step: strata per process lose most of the gain.
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
        slots: (B,) int64 places of the rows in the global batch, in [0, num_slots).
        num_slots: rows in a full global batch.

    Returns:
        (B,) float64 in [0, 1).
    """
    return counter_uniform(seed, NoiseStream.TIMESTEP, step, slots)


def stratified(seed: int, step: int, slots: Tensor, num_slots: int) -> Tensor:
    """One timestep in each of `num_slots` equal strata: `t_k = (permutation(k) + u_k) / num_slots`.

    The permutation is drawn anew at every step, so the place of a row in the batch carries no information about its
    noise level (it would if batches are sorted by length). Arguments and result as `uniform`.
    Lower-variance sampling as in MDLM (arXiv 2406.07524, section 3.5) and VDM (arXiv 2107.00630, appendix I.1).
    """
    order = counter_uniform(
        seed, NoiseStream.TIMESTEP_ORDER, step, torch.arange(num_slots, device=slots.device)
    ).argsort()
    return (order[slots] + uniform(seed, step, slots, num_slots)) / num_slots


TIMESTEP_SAMPLERS: dict[str, TimestepSampler] = {"stratified": stratified, "uniform": uniform}
