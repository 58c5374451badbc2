"""Exact normalisation of the weighted masked cross-entropy.

With `c_ij` = weight times cross-entropy of masked token `j` of row `i`, and `A_i` = target tokens of the row:

- `tokens`: `sum c_ij / sum A_i`, nats per target token of the corpus (LLaDA pretraining; what perplexity uses);
- `sequences`: `mean over rows of (1 / A_i) sum_j c_ij` (LLaDA SFT, arXiv 2502.09992, eq. 5 and its guidelines).

Both sums run over the whole optimiser step: all processes, all microbatches. So each masked token gets a loss weight
that already holds the denominator, and the loss of a microbatch is a plain weighted sum. Dividing by the number of
MASKED tokens instead would turn the bound into another objective.
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


def loss_weights(token_weights: Tensor, target_mask: Tensor, normalization: str, num_items: Tensor) -> Tensor:
    """Weights of masked tokens in the loss of the whole step: the denominator is put into them.

    The loss of a microbatch is `sum over masked tokens of loss_weight * cross_entropy`; the sum over the microbatches
    of a step is the loss of the step in nats per token.

    Args:
        token_weights: (R, L) weights of `token_weights`, or (R,) one for all masked tokens of a row.
        target_mask: (R, L) bool.
        normalization: `tokens` or `sequences`.
        num_items: scalar, `count_items` summed over the whole step; or (R,), the denominator of each row, where a loss
            is a sum of parts with denominators of their own.

    Returns:
        float64, of the shape of `token_weights`.
    """
    denominator = num_items.clamp(min=1).to(torch.float64).expand(len(token_weights))
    if normalization == "sequences":
        denominator = denominator * target_mask.sum(dim=1).clamp(min=1)
    return token_weights / denominator.view(-1, *[1] * (token_weights.dim() - 1))
