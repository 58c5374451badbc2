"""Guidance by a classifier: any `log p(y | x)` steers the sampler, without training the denoiser for it.

By Bayes' rule a masked position takes token `v` with probability proportional to `p(v | x_t) p(y | x_t with v)^gamma`
(D-CBG of Schiff et al., "Simple Guidance Mechanisms for Discrete Diffusion Models", arXiv 2412.10193, for the masked
family). `log p(y | x_t)`, which is the same for every token of a position, vanishes in the normalisation. With the
Bayes classifier and gamma 1, one token at a time samples `p(x | y)` exactly, in any order.

The paper tilts the whole transition, also the chance to stay masked, so that its guidance changes how many tokens a
step unmasks. Here the sampler alone decides that; only the choice between tokens is tilted.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

CLASSIFIER_METHODS = ("exact", "first_order")


class ClassifierLogProb(Protocol):
    """What a user supplies: `log p(y | x)` of sequences in which some tokens are still masks.

    With a sequence classifier of transformers that was trained on masked text (`labels[rows]` asks for another class
    in each row; a constant column does for one class):

        def log_prob(input_ids, attention_mask, rows):
            logits = classifier(input_ids=input_ids, attention_mask=attention_mask).logits
            return logits.log_softmax(-1).gather(1, labels[rows, None]).squeeze(1)

    For `method="first_order"` the first argument is one-hot rows, and the first line becomes

        embeddings = one_hot.to(table.dtype) @ table  # table = classifier.get_input_embeddings().weight
        logits = classifier(inputs_embeds=embeddings, attention_mask=attention_mask).logits
    """

    def __call__(self, inputs: Tensor, attention_mask: Tensor, rows: Tensor, /) -> Tensor:
        """Return `(n,)` log-probabilities, row by row: no row may depend on another.

        Args:
            inputs: `(n, T)` ids for the method "exact", `(n, T, V)` one-hot rows for "first_order", of which the
                result is a differentiable function. Prompt, committed tokens and masks, in the denoiser's vocabulary.
            attention_mask: `(n, T)` int64, 0 at padding (which is on the left).
            rows: `(n,)` int64, the row of the sampler's batch that each sequence belongs to.
        """
        ...


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by a classifier, to pass to `dlm_tune.generate(..., classifier=...)`.

    Parameters:
        log_prob: see `ClassifierLogProb`; -inf excludes a token. Any score will do, such as a reward: the law is
            tilted by `exp(scale * score)`. Put the classifier into evaluation mode yourself.
        scale: gamma; 0 is the unguided model, and the classifier is not called.
        method: "exact" evaluates every token at every masked position: `N * V` sequences a step. "first_order" takes
            one forward and backward pass a step, and `log p(y | x_t with v) - log p(y | x_t)` for
            `<onehot(v) - onehot(mask), gradient at x_t>`: exact if `log_prob` is linear in each one-hot row,
            otherwise a Taylor approximation to first order.
        top_k: evaluate only the denoiser's `top_k` best tokens at each position and exclude all others (as FUDGE does,
            arXiv 2104.05218): `N * top_k` sequences a step, for real vocabularies. An approximation: the exact guided
            law of the denoiser cut to those tokens. None takes all. Only with "exact".
        batch_size: sequences in one call of `log_prob`.

    Raises:
        ValueError: all faults at once, each with field, value and remedy.
    """

    log_prob: ClassifierLogProb
    scale: float = 1.0
    method: str = "exact"
    top_k: int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        problems = [*self._problems()]
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise ValueError(f"{count} in ClassifierGuidance:\n  " + "\n  ".join(problems))

    def _problems(self) -> Iterable[str]:
        if not callable(self.log_prob):
            yield (
                f"log_prob={self.log_prob!r} must be callable as log_prob(inputs, attention_mask, rows) and return "
                "log p(y | x) of each row."
            )
        if not _is_number(self.scale) or not (math.isfinite(self.scale) and self.scale >= 0):
            yield (
                f"scale={self.scale!r} is no power of p(y | x). Use 0 or more; to steer away from y, let log_prob "
                "return log(1 - p(y | x))."
            )
        if self.method not in CLASSIFIER_METHODS:
            nearest = difflib.get_close_matches(str(self.method), CLASSIFIER_METHODS, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            yield f"unknown method {self.method!r}: choose 'exact' or 'first_order'.{hint}"
        if self.top_k is not None and not _is_count(self.top_k):
            yield f"top_k={self.top_k!r} is no number of tokens. Use 1 or more, or None for every token."
        elif self.top_k is not None and self.method == "first_order":
            yield (
                f"top_k={self.top_k} has no effect with method='first_order', which evaluates no token one by one. "
                "Leave it out."
            )
        if not _is_count(self.batch_size):
            yield f"batch_size={self.batch_size!r} is no number of sequences. Use 1 or more."


def classifier_guided_logits(
    logits: Tensor,
    input_ids: Tensor,
    position_mask: Tensor,
    guidance: ClassifierGuidance,
    *,
    attention_mask: Tensor | None = None,
    rows: Tensor | None = None,
    forbidden_ids: Sequence[int] = (),
) -> Tensor:
    """Return `logits + scale * log(p(y | x_t with v) / p(y | x_t))` up to a constant a position.

    Works under `torch.no_grad`, and leaves no gradient in the classifier's parameters.

    Args:
        logits: `(N, V)` of the denoiser, at the true positions of `position_mask` in row-major order.
        input_ids: `(R, T)` sequences `x_t`, masks included.
        position_mask: `(R, T)` bool, the `N` masked positions to guide.
        guidance: the classifier and how to use it.
        attention_mask: `(R, T)`, 0 at padding; None when nothing is padded.
        rows: `(R,)`, passed to the classifier; by default 0, 1, ....
        forbidden_ids: tokens that may not be proposed (the mask token); they get -inf and cost no evaluation.

    Returns:
        `(N, V)` unnormalised log-probabilities, float32 (float64 if the logits are), -inf at tokens that are excluded.
        `logits` themselves if the scale is 0.

    Raises:
        ValueError: scores of the wrong shape or type, NaN or infinite ones, a result without a gradient, or a position
            at which every token is excluded.
    """
    if guidance.scale == 0 or not len(logits):
        return logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    forbidden = [token_id for token_id in forbidden_ids if token_id < logits.shape[-1]]
    logits = logits.index_fill(-1, torch.tensor(forbidden, dtype=torch.long, device=logits.device), -torch.inf)
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    rows = torch.arange(len(input_ids), device=input_ids.device) if rows is None else rows
    batch = _Batch(input_ids, attention_mask, rows, *position_mask.nonzero(as_tuple=True))
    tilt = _exact_scores if guidance.method == "exact" else _first_order_scores
    guided = logits + guidance.scale * tilt(logits, batch, guidance)
    excluded = (guided.amax(-1) == -torch.inf).nonzero()
    if len(excluded):
        n = int(excluded[0])
        raise ValueError(
            f"log_prob excludes every token that may stand at position {int(batch.column[n])} of row "
            f"{int(rows[batch.row[n]])}: its scores are -inf there. Let it return a finite floor instead, such as "
            f".clamp(min=-50){', or raise top_k' if guidance.top_k else ''}."
        )
    return guided


@dataclass
class _Batch:
    """`R` sequences, and the row and column `(N,)` of each position to guide."""

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    row: Tensor
    column: Tensor


def _exact_scores(logits: Tensor, batch: _Batch, guidance: ClassifierGuidance) -> Tensor:
    """`log p(y | x_t with v at the position)`, `(N, V)`, -inf where a token is not evaluated."""
    num_candidates = int((logits > -torch.inf).sum(-1).amax())
    num_candidates = min(guidance.top_k or num_candidates, num_candidates)
    candidates = logits.topk(num_candidates, dim=-1).indices
    scores = []
    # A flat list of N * K pairs (position, token), so that every call but the last is full.
    for pairs in torch.arange(candidates.numel(), device=logits.device).split(guidance.batch_size):
        position = pairs // num_candidates
        row = batch.row[position]
        sequences = batch.input_ids[row]
        sequences[torch.arange(len(pairs), device=row.device), batch.column[position]] = candidates.flatten()[pairs]
        with torch.no_grad():
            score = guidance.log_prob(sequences, batch.attention_mask[row], batch.rows[row])
        scores.append(_checked(score, len(pairs)))
    values = torch.cat(scores).to(logits).reshape(candidates.shape)
    return torch.full_like(logits, -torch.inf).scatter(-1, candidates, values)


def _first_order_scores(logits: Tensor, batch: _Batch, guidance: ClassifierGuidance) -> Tensor:
    """`<onehot(v), gradient>` of `log p(y | x_t)` at each position, `(N, V)`; the mask's own is a constant there."""
    gradients = []
    for chunk in torch.arange(len(batch.input_ids), device=logits.device).split(guidance.batch_size):
        # Copies, since autograd cannot keep what a caller's inference_mode has made.
        with torch.inference_mode(False), torch.enable_grad():
            relaxed = one_hot(batch.input_ids[chunk].clone(), logits.shape[-1]).to(logits.dtype).requires_grad_()
            score = guidance.log_prob(relaxed, batch.attention_mask[chunk].clone(), batch.rows[chunk].clone())
            _checked(score, len(chunk))
            gradient = None
            if score.requires_grad:
                (gradient,) = torch.autograd.grad(score.sum(), relaxed, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "log_prob returned scores without a gradient to its one-hot input, which method='first_order' needs: "
                "compute them from the one-hot rows without detach() or argmax(), or use method='exact'."
            )
        is_here = (batch.row >= chunk[0]) & (batch.row <= chunk[-1])
        gradients.append(gradient[batch.row[is_here] - chunk[0], batch.column[is_here]])
    gradient = torch.cat(gradients)
    if not bool(gradient.isfinite().all()):
        raise ValueError(
            "the gradient of log_prob is NaN or infinite, so that method='first_order' has no direction: check that "
            "log p(y | x) is finite on sequences with masks, or use method='exact'."
        )
    return gradient


def _checked(scores: Any, num_sequences: int) -> Tensor:
    """The classifier's result, if it is one score a sequence."""
    if not isinstance(scores, Tensor) or scores.shape != (num_sequences,) or not scores.is_floating_point():
        found = (
            f"shape {tuple(scores.shape)} and dtype {scores.dtype}"
            if isinstance(scores, Tensor)
            else f"type {type(scores).__name__}"
        )
        raise ValueError(
            f"log_prob returned {found} for {num_sequences} sequences: return a float tensor of shape "
            f"({num_sequences},), log p(y | x) of one class y a row."
        )
    if bool((scores.isnan() | (scores == torch.inf)).any()):
        value = scores[scores.isnan() | (scores == torch.inf)][0].item()
        raise ValueError(
            f"log_prob returned {value} for a sequence: log-probabilities are finite, or -inf to exclude a token. "
            "Take log_softmax of the logits rather than the log of probabilities."
        )
    return scores


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
