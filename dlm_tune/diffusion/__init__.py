"""Masked (absorbing-state) diffusion in plain torch: noise, schedules, corruption, losses, likelihood bounds.

Notation: `B` rows, `L` positions, `A` maskable target tokens of a row, `t` in [0, 1], `alpha_t` = probability that a
token is still clean at `t`, mask probability `p = 1 - alpha_t`. Nothing here imports from the rest of the package.
"""

from dlm_tune.diffusion.corruption import MASKINGS, NoisyBatch, corrupt
from dlm_tune.diffusion.likelihood import NELBOEstimate, enumerate_nelbo, noise_bank, summarise_replicates
from dlm_tune.diffusion.losses import NORMALIZATIONS, count_items, loss_weights
from dlm_tune.diffusion.noise import NoiseStream, counter_uniform
from dlm_tune.diffusion.schedules import NOISE_SCHEDULES, NoiseSchedule
from dlm_tune.diffusion.timesteps import TIMESTEP_SAMPLERS

__all__ = [
    "MASKINGS",
    "NOISE_SCHEDULES",
    "NORMALIZATIONS",
    "TIMESTEP_SAMPLERS",
    "NELBOEstimate",
    "NoiseSchedule",
    "NoiseStream",
    "NoisyBatch",
    "corrupt",
    "count_items",
    "counter_uniform",
    "enumerate_nelbo",
    "loss_weights",
    "noise_bank",
    "summarise_replicates",
]
