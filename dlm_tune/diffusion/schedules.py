"""Noise schedules of absorbing-state diffusion.

A schedule is the survival probability `alpha(t)` of a token, decreasing from clean (`t = 0`) to masked (`t = 1`), with
the two functions that must agree with it: the NELBO weight `-alpha'(t) / (1 - alpha(t))` (MDLM, arXiv 2406.07524,
eq. 10) and the inverse of `alpha`. They live together so that a weight is never paired with the mask probability of
another schedule, which biases the loss.

The NELBO is the same for every schedule with `alpha(0) = 1` and `alpha(1) = 0`: the schedule only decides where the
forward passes are spent. All but `geometric` have these ends exactly, without the `eps` that MDLM's code puts into
`alpha`: a cut-off belongs to the timesteps (`noise_epsilon` of `corrupt`), where its bias is documented. MDLM, MD4 and
MaskGIT use the name "cosine" for two different functions; here they are `cosine` and `cosine_mdlm`.

To add a schedule: write its three functions and one entry of `NOISE_SCHEDULES`; the tests run over the entries. They
are written such that float64 keeps its relative accuracy near both ends (no `1 - cos(x)` of a small `x`). Times are
in (0, 1] and survival probabilities in [0, 1]; nothing is checked here, since that would synchronise the device at
every step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
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


# LLaDA (arXiv 2502.09992, eq. 3). MDLM and SEDD call it "log-linear", since sigma(t) = -log alpha(t) = -log(1 - t).
LINEAR = NoiseSchedule(
    alpha=lambda t: 1 - t,
    weight=lambda t: 1 / t,
    inverse_alpha=lambda alpha_t: 1 - alpha_t,
)

# MaskGIT (arXiv 2202.04200) and MD4 (arXiv 2406.04329): alpha = 1 - cos(pi/2 (1 - t)) = 1 - sin(pi t / 2), here
# cos(pi t / 2)**2 / (1 + sin(pi t / 2)); w = pi/2 tan(pi/2 (1 - t)).
COSINE = NoiseSchedule(
    alpha=lambda t: torch.sin(math.pi / 2 * (1 - t)).square() / (1 + torch.sin(math.pi / 2 * t)),
    weight=lambda t: math.pi / 2 * torch.sin(math.pi / 2 * (1 - t)) / torch.sin(math.pi / 2 * t),
    inverse_alpha=lambda alpha_t: (
        2 / math.pi * torch.atan2(1 - alpha_t, (alpha_t * (2 - alpha_t)).clamp(min=0).sqrt())
    ),
)

# "Cosine" of MDLM's code, without its eps: alpha = cos(pi t / 2), w = pi/2 sin(pi t / 2) / (1 - cos(pi t / 2)).
COSINE_MDLM = NoiseSchedule(
    alpha=lambda t: torch.sin(math.pi / 2 * (1 - t)),
    weight=lambda t: math.pi / 2 / torch.tan(math.pi / 4 * t),
    inverse_alpha=lambda alpha_t: (
        2 / math.pi * torch.atan2(((1 - alpha_t) * (1 + alpha_t)).clamp(min=0).sqrt(), alpha_t)
    ),
)

# "Cosine squared" of MDLM's code, without its eps: alpha = cos(pi t / 2)**2, w = pi cot(pi t / 2).
COSINE_SQUARED_MDLM = NoiseSchedule(
    alpha=lambda t: torch.sin(math.pi / 2 * (1 - t)).square(),
    weight=lambda t: math.pi * torch.sin(math.pi / 2 * (1 - t)) / torch.sin(math.pi / 2 * t),
    inverse_alpha=lambda alpha_t: 2 / math.pi * torch.atan2((1 - alpha_t).clamp(min=0).sqrt(), alpha_t.sqrt()),
)


def polynomial(power: float) -> NoiseSchedule:
    """`alpha(t) = 1 - t**power`, weight `power / t` (MD4's "polynomial").

    A mean fraction `1 / (power + 1)` of the tokens is masked. With `masking: bernoulli` the second moment of the
    weight, `power**2 * integral of t**(power - 2)`, is finite for `power > 1` only.

    Raises:
        ValueError: `power` is not a positive finite number.
    """
    if not (0 < power < math.inf):
        raise ValueError(f"power={power} must be a positive number, else alpha(t) = 1 - t**power does not decrease")
    return NoiseSchedule(
        alpha=lambda t: -torch.expm1(power * t.log()),
        weight=lambda t: power / t,
        inverse_alpha=lambda alpha_t: (1 - alpha_t) ** (1 / power),
    )


def geometric(sigma_min: float = 1e-5, sigma_max: float = 20.0) -> NoiseSchedule:
    """`alpha(t) = exp(-sigma)` with `sigma(t) = sigma_min**(1 - t) * sigma_max**t` (SEDD, arXiv 2310.16834).

    The weight is `sigma * log(sigma_max / sigma_min) / (exp(sigma) - 1)`. This schedule does not reach its ends:
    `alpha(0) = exp(-sigma_min) < 1` and `alpha(1) = exp(-sigma_max) > 0`. With `masking: bernoulli` the loss therefore
    lacks the part of the NELBO with a mask probability outside `[1 - alpha(0), 1 - alpha(1)]`: about `sigma_min` times
    the cross-entropy of the row with one masked token at a time, and `alpha(1)` times that of the fully masked row.
    `masking: exact_count` has no such bias. The defaults (1e-5 and 2e-9 of a row's nats) suit an absorbing state;
    SEDD's class defaults (1e-3, 1) would leave 37 % of the tokens clean at `t = 1`.

    `inverse_alpha` of a probability outside `[alpha(1), alpha(0)]` is 1 or 0.

    Raises:
        ValueError: not `0 < sigma_min < sigma_max`, or a number that is not finite.
    """
    if not (0 < sigma_min < sigma_max < math.inf):
        raise ValueError(
            f"sigma_min={sigma_min} and sigma_max={sigma_max} must satisfy 0 < sigma_min < sigma_max, "
            "else alpha(t) does not decrease"
        )
    log_ratio = math.log(sigma_max / sigma_min)

    def sigma(t: Tensor) -> Tensor:
        return sigma_min * torch.exp(log_ratio * t)

    return NoiseSchedule(
        alpha=lambda t: torch.exp(-sigma(t)),
        weight=lambda t: log_ratio * sigma(t) / torch.expm1(sigma(t)),
        inverse_alpha=lambda alpha_t: ((-alpha_t.log() / sigma_min).log() / log_ratio).clamp(0, 1),
    )


NOISE_SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": LINEAR,
    "log_linear": LINEAR,  # the same schedule under the name of MDLM and SEDD
    "cosine": COSINE,
    "cosine_mdlm": COSINE_MDLM,
    "cosine_squared_mdlm": COSINE_SQUARED_MDLM,
    "geometric": geometric(),
    "polynomial": polynomial(1.25),
}
