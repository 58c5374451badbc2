"""Confidence of the tokens proposed in a step: the highest ones are committed, the others stay masked.

Every function takes the log-probabilities `(N, V)` of the masked positions (float64, the mask token excluded, before
temperature as in LLaDA), the ranked tokens `(N,)` and one uniform number a position `(N,)`, and gives float64 `(N,)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ConfidenceFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def low_confidence(log_probs: Tensor, ranked_tokens: Tensor, uniforms: Tensor) -> Tensor:
    """Log-probability of the ranked token; LLaDA's `low_confidence` remasking, MaskGIT's rule."""
    return log_probs.gather(-1, ranked_tokens[:, None]).squeeze(-1)


def margin(log_probs: Tensor, ranked_tokens: Tensor, uniforms: Tensor) -> Tensor:
    """Probability of the best token minus that of the second best; Dream's `topk_margin`."""
    best = log_probs.topk(min(2, log_probs.shape[-1]), dim=-1).values.exp()
    return best[:, 0] - best[:, 1:].sum(-1)


def entropy(log_probs: Tensor, ranked_tokens: Tensor, uniforms: Tensor) -> Tensor:
    """Negative entropy, in nats, of the predictive distribution; Dream's `entropy`."""
    return -torch.special.entr(log_probs.exp()).sum(-1)


def random(log_probs: Tensor, ranked_tokens: Tensor, uniforms: Tensor) -> Tensor:
    """The uniform number itself: a uniformly random choice of positions."""
    return uniforms


CONFIDENCE_FUNCTIONS: dict[str, ConfidenceFunction] = {
    "low_confidence": low_confidence,
    "margin": margin,
    "entropy": entropy,
    "random": random,
}
