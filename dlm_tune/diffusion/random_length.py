"""Random shortening of rows, so that a model also sees lengths below its context length."""

import torch
from torch import Tensor

from dlm_tune.diffusion.noise import NoiseStream, counter_uniform


def random_lengths(seed: int, epoch: int, row_index: Tensor, lengths: Tensor, probability: float) -> Tensor:
    """With `probability`, a row keeps only its first `U{1..length}` tokens; otherwise all of them.

    LLaDA pretrains so with probability 0.01 (arXiv 2502.09992; its guidelines cut a whole batch to one length). Here
    each row draws for itself, keyed by (seed, epoch, row index), so its length does not depend on its batch-mates.

    Args:
        seed: noise seed.
        epoch: pass over the data; gives fresh lengths in every epoch.
        row_index: (R,) int64, index of each row in the data set.
        lengths: (R,) int64 tokens of each row.
        probability: of a cut, in [0, 1].

    Returns:
        (R,) int64 new lengths, in 1..length (0 for an empty row).
    """
    is_cut = counter_uniform(seed, NoiseStream.RANDOM_LENGTH_CHOICE, epoch, row_index) < probability
    drawn = (counter_uniform(seed, NoiseStream.RANDOM_LENGTH, epoch, row_index) * lengths).long() + 1
    return torch.where(is_cut, torch.minimum(drawn, lengths), lengths)
