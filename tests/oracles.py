"""Models small enough to enumerate: the independent computations that the library must agree with."""

import itertools
import math

import torch
from torch import Tensor

MASK = 3  # mask token id of the table models: three ordinary tokens 0, 1, 2


class TableModel:
    """Random conditionals `p(x_i | visible tokens)` for every partly masked row: consistent with no joint."""

    def __init__(self, length: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.length = length
        self.table = {
            row: torch.randn(length, MASK, generator=generator, dtype=torch.float64).log_softmax(-1)
            for row in itertools.product(range(MASK + 1), repeat=length)
        }

    def log_probs(self, noisy_input_ids: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, 3) log-probabilities."""
        return torch.stack([self.table[tuple(row)] for row in noisy_input_ids.tolist()])

    def cross_entropy(self, input_ids: Tensor, noisy_input_ids: Tensor, masked: Tensor) -> Tensor:
        """(N,) cross-entropy of the masked tokens in row-major order."""
        log_probs = self.log_probs(noisy_input_ids)
        return -log_probs.gather(-1, input_ids.expand_as(noisy_input_ids)[..., None])[..., 0][masked]


def any_order_nelbo(model: TableModel, row: Tensor) -> float:
    """Mean over all orders of the chain-rule negative log-likelihood: the NELBO by its other definition."""
    total = 0.0
    for order in itertools.permutations(range(model.length)):
        noisy = torch.full_like(row, MASK)
        for position in order:
            total -= float(model.log_probs(noisy[None])[0, position, row[position]])
            noisy[position] = row[position]
    return total / math.factorial(model.length)


def order_mixture_log_likelihood(model: TableModel, row: Tensor) -> float:
    """log of the mean over orders of the probability of the row: what the NELBO bounds."""
    probabilities = []
    for order in itertools.permutations(range(model.length)):
        noisy, log_prob = torch.full_like(row, MASK), 0.0
        for position in order:
            log_prob += float(model.log_probs(noisy[None])[0, position, row[position]])
            noisy[position] = row[position]
        probabilities.append(math.exp(log_prob))
    return math.log(sum(probabilities) / len(probabilities))
