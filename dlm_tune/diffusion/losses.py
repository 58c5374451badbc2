"""Exact normalisation of the weighted masked cross-entropy.

With `c_ij` = NELBO weight times cross-entropy of masked token `j` of row `i`, and `A_i` = target tokens of the row:

- `tokens`: `sum c_ij / sum A_i`, nats per target token of the corpus (LLaDA pretraining; what perplexity uses);
- `sequences`: `mean over rows of (1 / A_i) sum_j c_ij` (LLaDA SFT, arXiv 2502.09992, eq. 5 and its guidelines).

Both sums run over the whole optimiser step: all processes, all microbatches. So each row gets a loss weight that
already holds the denominator, and the loss of a microbatch is a plain weighted sum. Dividing by the number of MASKED
tokens instead would turn the bound into another objective.
"""

import torch
from torch import Tensor

NORMALIZATIONS = ("tokens", "sequences")


def count_items(target_mask: Tensor, normalization: str) -> Tensor:
    """What the denominator counts in these rows: target tokens, or rows that have one; scalar float64.

    Sum it over all microbatches and processes of a step to get `num_items` of `loss_weights`.

    Raises:
        ValueError: unknown `normalization`.
    """
    if normalization == "tokens":
        return target_mask.sum().to(torch.float64)
    if normalization == "sequences":
        return target_mask.any(dim=1).sum().to(torch.float64)
    raise ValueError(f"loss_normalization='{normalization}' is unknown: choose 'tokens' or 'sequences'")


def loss_weights(weights: Tensor, target_mask: Tensor, normalization: str, num_items: Tensor) -> Tensor:
    """Weight of each masked token of a row in the loss of the whole step.

    The loss of a microbatch is `sum over masked tokens of loss_weight[row] * cross_entropy`; the sum over the
    microbatches of a step is the loss of the step in nats per token.

    Args:
        weights: (B,) NELBO weights of `corrupt`.
        target_mask: (B, L) bool.
        normalization: `tokens` or `sequences`.
        num_items: scalar, `count_items` summed over the whole step.

    Returns:
        (B,) float64.
    """
    num_items = num_items.clamp(min=1)
    if normalization == "tokens":
        return weights / num_items
    return weights / (target_mask.sum(dim=1).clamp(min=1) * num_items)
