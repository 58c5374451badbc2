"""What a masked token counts in the training loss.

- `nelbo`: the NELBO weight of its row, `NoisyBatch.weights`. The only one whose loss bounds `-log p`.
- `uniform`: 1. The masked-language-model loss averaged over noise levels (dLLM's `loss_weight_type="uniform"`): nats
  of masked tokens per target token.
- `cart`: context-adaptive token-level noise rescheduling (Dream, arXiv 2508.15487): a token counts the more, the more
  visible tokens are near it. With `Geo_p(d) = p (1 - p)**(d - 1)` for a distance `d >= 1`,

      w_n = 1/2 * sum over visible m of Geo_p(|n - m|),

  between 0 (nothing visible) and 1 (everything else visible). It replaces the NELBO weight.

The losses of `uniform` and `cart` are no bounds and are not comparable with a NELBO, nor with each other.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dlm_tune.diffusion.corruption import NoisyBatch

LOSS_WEIGHTINGS = ("nelbo", "uniform", "cart")


def token_weights(
    noisy: NoisyBatch, target_mask: Tensor, attention_mask: Tensor, weighting: str, *, geometric_p: float = 0.3
) -> Tensor:
    """Weight of every masked token in the sum of cross-entropies, before normalisation (`loss_weights`).

    Args:
        noisy: rows after the forward process.
        target_mask: (R, L) bool; a token outside has weight 0, also if it was masked.
        attention_mask: (R, L), nonzero where a token is attended; padding only at the ends of a row. For `cart`,
            visible tokens are those attended and not masked, prompts among them.
        weighting: one of `LOSS_WEIGHTINGS`.
        geometric_p: `cart` only, in (0, 1]: the larger, the nearer the tokens that count.

    Returns:
        (R, L) float64, 0 where not masked.

    Raises:
        ValueError: unknown `weighting`, or `geometric_p` outside (0, 1].
    """
    scored = noisy.masked & target_mask
    if weighting == "nelbo":
        return noisy.weights[:, None].where(scored, 0.0)
    if weighting == "uniform":
        return scored.to(torch.float64)
    if weighting == "cart":
        visible = (attention_mask.bool() & ~noisy.masked).to(torch.float64)
        return _nearby_context(visible, geometric_p) * scored
    raise ValueError(f"loss_weighting='{weighting}' is unknown: choose {', '.join(map(repr, LOSS_WEIGHTINGS))}")


def _nearby_context(visible: Tensor, geometric_p: float) -> Tensor:
    """(R, L) `1/2 * sum over m != n of Geo_p(|n - m|) visible[m]`."""
    if not 0 < geometric_p <= 1:
        raise ValueError(f"geometric_p={geometric_p} must be in (0, 1]: it is the parameter of a geometric law")
    left = _decayed_sum(functional.pad(visible, (1, 0))[:, :-1], 1 - geometric_p)
    right = _decayed_sum(functional.pad(visible, (0, 1))[:, 1:].flip(1), 1 - geometric_p).flip(1)
    return geometric_p / 2 * (left + right)


def _decayed_sum(values: Tensor, decay: float) -> Tensor:
    """(R, L) `sum over d >= 0 of decay**d values[:, n - d]`, by doubling: log2(L) steps and no (L, L) matrix."""
    distance = 1
    while distance < values.shape[1]:
        values = values + decay**distance * functional.pad(values[:, :-distance], (distance, 0))
        distance *= 2
    return values
