"""What the estimators must agree with: the law of the mask counts, and the integral over mask probabilities."""

import numpy
import torch
from torch import Tensor

from dlm_tune.diffusion import NoiseSchedule, corrupt


def count_edges(schedule: NoiseSchedule, total: int) -> Tensor:
    """(total + 1,) edges of t, by bisection: between edges `l - 1` and `l`, `corrupt` masks `l` of `total` tokens."""
    limits = torch.arange(1, total)
    low, high = torch.zeros(total - 1, dtype=torch.float64), torch.ones(total - 1, dtype=torch.float64)
    ids = torch.zeros(total - 1, total, dtype=torch.long)
    uniforms = torch.arange(total, dtype=torch.float64).expand(total - 1, -1) / total
    for _ in range(50):
        middle = (low + high) / 2
        noisy = corrupt(ids, ids == 0, middle, uniforms, schedule=schedule, masking="exact_count", mask_token_id=1)
        above = noisy.masked.sum(dim=1) > limits
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.cat([torch.zeros(1, dtype=torch.float64), high, torch.ones(1, dtype=torch.float64)])


def integral_of_bernoulli(by_size: Tensor, low: float, high: float) -> float:
    """The integral over p from `low` to `high` of `F(p) / p`, a polynomial in p, by its antiderivative.

    `F(p)` is the summed cross-entropy with masks of probability p, `by_size` that of `enumerate_cross_entropy`.
    """
    integral = 0.0
    for size in range(1, len(by_size)):
        one_size = numpy.polynomial.Polynomial([0.0] * (size - 1) + [1.0])
        one_size *= numpy.polynomial.Polynomial([1.0, -1.0]) ** (len(by_size) - 1 - size)
        antiderivative = one_size.integ()
        integral += float(by_size[size]) * (antiderivative(high) - antiderivative(low))
    return float(integral)
