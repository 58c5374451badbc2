"""The law of the mask counts of `exact_count`, measured on what `corrupt` does."""

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
