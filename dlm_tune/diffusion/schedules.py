"""Noise schedules of absorbing-state diffusion.

A schedule is the survival probability `alpha(t)`, decreasing from `alpha(0) = 1` (clean) to `alpha(1) = 0` (all
masked), with the two functions that must agree with it: the NELBO weight `-alpha'(t) / (1 - alpha(t))` (MDLM,
arXiv 2406.07524, eq. 10) and the inverse of `alpha`. They live together so that a weight is never paired with the mask
probability of another schedule, which biases the loss.

To add a schedule: write its three functions and one entry of `NOISE_SCHEDULES`. Times are in (0, 1]; the timestep
samplers guarantee it, since a check here would synchronise the device at every step.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class NoiseSchedule(NamedTuple):
    """The functions of a schedule, elementwise in `t` (or in `alpha_t`); shapes are kept.

    Attributes:
        alpha: `t -> alpha_t`, the probability that a token is still clean.
        weight: `t -> -alpha'(t) / (1 - alpha(t))`, the NELBO weight of a masked token.
        inverse_alpha: `alpha_t -> t`.
    """

    alpha: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    inverse_alpha: Callable[[Tensor], Tensor]


# LLaDA (arXiv 2502.09992, eq. 3); called "log-linear" in MDLM and SEDD, since sigma(t) = -log(1 - t).
LINEAR = NoiseSchedule(
    alpha=lambda t: 1 - t,
    weight=lambda t: 1 / t,
    inverse_alpha=lambda alpha_t: 1 - alpha_t,
)

NOISE_SCHEDULES: dict[str, NoiseSchedule] = {"linear": LINEAR}
