"""A linear LM head, its cross-entropy and their gradients in one pass over chunks of rows.

For logits z = h W^T + b, the gradient of a row's negative log-likelihood is known as soon as its logits are:
d nll / d z = softmax(z) - onehot(target). So while the logits of a chunk exist, its share of the gradients of h, W and
b is computed over the same buffer: the three matrix products that dense logits need too, nothing of size (N, V), and
no recomputation. What is kept until the backward pass are the gradients themselves, (N, D) and, if the head is
trainable, (V, D).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# float16 loses precision below 6e-5, where most probabilities of a large vocabulary are: they are scaled by this.
_FLOAT16_SCALE = 1024.0
# Logits that a CPU works on at a time, few enough for its cache.
_CACHED_ELEMENTS = 2**20


class LinearHead(NamedTuple):
    """What the logits are computed from.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        logit_softcap: logits become `cap * tanh(logits / cap)`; None for logits as they are.
        chunk_rows: most rows whose logits exist at a time.
        dtype: what hidden states, weight and bias are multiplied in; None for `compute_dtype` of the call.
    """

    weight: Tensor
    bias: Tensor | None
    logit_softcap: float | None
    chunk_rows: int
    dtype: torch.dtype | None = None


class HeadScores(NamedTuple):
    """Scores of N rows and the gradients of their weighted sum.

    Attributes:
        token_nll: (N,) nats, float32, or float64 for float64 inputs.
        is_top1: (N,) bool, whether the target is the argmax.
        gradients: of hidden (N, D), weight (V, D) and bias (V,), None where not asked for.
        scale: what the gradients are to be multiplied by; None stands for 1.
    """

    token_nll: Tensor
    is_top1: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
    scale: Tensor | None


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that `nn.Linear` multiplies in: autocast's where it is on, which leaves float64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def score_rows(
    head: LinearHead,
    hidden: Tensor,
    target_ids: Tensor,
    token_weights: Tensor | None = None,
    wants: tuple[bool, bool, bool] = (False, False, False),
) -> HeadScores:
    """Score the rows, and compute the gradients of `sum(token_weights * nll)` that `wants` names.

    Args:
        head: the head.
        hidden: (N, D).
        target_ids: (N,) long.
        token_weights: (N,) float; None stands for ones.
        wants: whether to compute the gradients with respect to hidden, weight and bias.
    """
    dtype = head.dtype or compute_dtype(hidden)
    statistics_dtype = torch.promote_types(dtype, torch.float32)
    row_weights = None if token_weights is None else token_weights.to(statistics_dtype)
    scale = None
    if dtype == torch.float16:
        row_weights = hidden.new_ones(len(hidden), dtype=torch.float32) if row_weights is None else row_weights
        row_weights, scale = _normalise_for_float16(row_weights)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        nll = hidden.new_empty(len(hidden), dtype=statistics_dtype)
        hits = hidden.new_empty(len(hidden), dtype=torch.bool)
        hidden_gradient, weight_gradient, bias_gradient = _gradient_buffers(hidden, head, dtype, wants)
        rows = _even_rows(len(hidden), head.chunk_rows)
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight), dtype=dtype)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            chunk_hidden = hidden[chunk].to(dtype)
            logits = buffer[: len(chunk_hidden)]
            if bias is None:
                torch.mm(chunk_hidden, weight.t(), out=logits)
            else:
                torch.addmm(bias, chunk_hidden, weight.t(), out=logits)
            # from here on `logits` holds the gradient with respect to the logits
            nll[chunk], hits[chunk] = _score_logits(logits, target_ids[chunk], head.logit_softcap, any(wants))
            factor = None if row_weights is None else row_weights[chunk, None]
            if hidden_gradient is not None:
                product = torch.mm(logits, weight)
                hidden_gradient[chunk] = product if factor is None else product * factor
            if weight_gradient is not None:
                weighted = chunk_hidden if factor is None else (chunk_hidden * factor).to(dtype)
                _add_product(weight_gradient, logits.t(), weighted)
            if bias_gradient is not None:
                ones = logits.new_ones(len(logits), 1) if factor is None else factor.to(dtype)
                _add_product(bias_gradient[:, None], logits.t(), ones)
    return HeadScores(nll, hits, (hidden_gradient, weight_gradient, bias_gradient), scale)


class WeightedLoss(torch.autograd.Function):
    """`sum(token_weights * nll)` of a head, whose backward pass only scales gradients that exist already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        token_weights: Tensor,
        head: LinearHead,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scalar loss, nll (N,) and whether each target is the argmax (N,); the latter two are constants.

        `weight` and `bias` are those of `head`, as arguments of their own so that autograd sees them.
        """
        scores = score_rows(head, hidden, target_ids, token_weights, tuple(ctx.needs_input_grad[:3]))
        ctx.gradients, ctx.scale = scores.gradients, scores.scale
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias))
        ctx.mark_non_differentiable(scores.token_nll, scores.is_top1)
        ctx.set_materialize_grads(False)
        loss = (scores.token_nll * token_weights.to(scores.token_nll.dtype)).sum()
        return loss, scores.token_nll, scores.is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Scale the gradients in place and give them away, so that a parameter can adopt its buffer as `.grad`."""
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of this loss were given away by a first backward pass. Sum the losses before one "
                "backward pass, or use token_nll of a forward without target_weights, which keeps its graph."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if upstream is None:
            return (None,) * 6
        factor = upstream if ctx.scale is None else upstream * ctx.scale
        return (*_finish(gradients, factor, ctx.dtypes), None, None, None)


class RecomputedScores(torch.autograd.Function):
    """Each row's nll under a trainable head; the backward pass makes the logits again, knowing the weights."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, head: LinearHead
    ) -> tuple[Tensor, Tensor]:
        """Return nll (N,) and whether each target is the argmax (N,), a constant."""
        scores = score_rows(head, hidden, target_ids)
        ctx.save_for_backward(hidden, weight, bias, target_ids)
        ctx.settings = (head.logit_softcap, head.chunk_rows, compute_dtype(hidden))  # autocast is off in backward
        ctx.mark_non_differentiable(scores.is_top1)
        return scores.token_nll, scores.is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """The gradients of `sum(upstream * nll)`; may be called again."""
        hidden, weight, bias, target_ids = ctx.saved_tensors
        head = LinearHead(weight, bias, *ctx.settings)
        scores = score_rows(head, hidden, target_ids, upstream, tuple(ctx.needs_input_grad[:3]))
        dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias))
        return (*_finish(scores.gradients, scores.scale, dtypes), None, None)


class TokenScores(torch.autograd.Function):
    """Each row's nll under a frozen head; its backward pass scales the rows of a gradient that exists already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target_ids: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
        """Return nll (N,) and whether each target is the argmax (N,), a constant."""
        scores = score_rows(head, hidden, target_ids, wants=(True, False, False))
        gradient = scores.gradients[0]
        assert gradient is not None
        ctx.save_for_backward(gradient)
        ctx.scale, ctx.dtype = scores.scale, hidden.dtype
        ctx.mark_non_differentiable(scores.is_top1)
        return scores.token_nll, scores.is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor, None, None]:
        """Multiply row i of the gradient by the upstream gradient of nll i; may be called again."""
        (gradient,) = ctx.saved_tensors
        factor = upstream if ctx.scale is None else upstream * ctx.scale
        return (gradient * factor[:, None]).to(ctx.dtype), None, None


def _finish(
    gradients: tuple[Tensor | None, ...], factor: Tensor | None, dtypes: tuple[torch.dtype | None, ...]
) -> list[Tensor | None]:
    """Multiply the gradients in place and give them the dtypes of what they belong to."""
    finished = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        if gradient is not None:
            # a pass over (V, D) is saved where looking at the factor does not make an accelerator wait
            if factor is not None and (factor.device.type != "cpu" or factor.item() != 1):
                gradient.mul_(factor)
            gradient = gradient.to(dtype)
        finished.append(gradient)
    return finished


def _even_rows(count: int, most: int) -> int:
    """Rows per chunk so that no chunk is much smaller than the others."""
    return max(1, -(-count // max(1, -(-count // most))))


def _normalise_for_float16(row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of magnitude at most 1, and what turns the scaled gradients into the true ones."""
    magnitude = row_weights.abs().max() if len(row_weights) else row_weights.new_ones(())
    magnitude = torch.where(magnitude > 0, magnitude, 1.0)
    return row_weights / magnitude, magnitude / _FLOAT16_SCALE


def _gradient_buffers(
    hidden: Tensor, head: LinearHead, dtype: torch.dtype, wants: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Zeros in at least float32 where chunks are summed; float16 is too narrow for what is scaled afterwards."""
    hidden_dtype = torch.float32 if torch.float16 in (hidden.dtype, dtype) else hidden.dtype
    return (
        hidden.new_empty(hidden.shape, dtype=hidden_dtype) if wants[0] else None,
        _zeros_for_sum(head.weight) if wants[1] else None,
        _zeros_for_sum(head.bias) if wants[2] and head.bias is not None else None,
    )


def _zeros_for_sum(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`; a product is not rounded to bfloat16 before it is added, where that can be had."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        rows = max(1, _CACHED_ELEMENTS // total.shape[1])
        # float16 is too narrow for a sum over rows
        dtype = torch.float32 if left.dtype == torch.float16 else left.dtype
        for start in range(0, len(total), rows):
            total[start : start + rows] += torch.mm(left[start : start + rows].to(dtype), right.to(dtype))


def _score_logits(
    logits: Tensor, target_ids: Tensor, logit_softcap: float | None, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return nll and hits (n,) of logits (n, V) before the softcap, and overwrite these with their gradient.

    float16 gradients are `_FLOAT16_SCALE` times the true ones. Without `wants_gradient` the content is undefined.
    """
    rows = max(1, _CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    parts = [
        _score_block(
            logits[start : start + rows], target_ids[start : start + rows, None], logit_softcap, wants_gradient
        )
        for start in range(0, len(logits), rows)
    ]
    nlls, hits = zip(*parts, strict=True)
    return torch.cat(nlls), torch.cat(hits)


def _score_block(
    logits: Tensor, target_ids: Tensor, logit_softcap: float | None, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tanh = None
    if logit_softcap is not None:
        tanh = (scores / logit_softcap).tanh_()
        scores = tanh * logit_softcap
    largest, argmax = scores.max(dim=1, keepdim=True)
    target = scores.gather(1, target_ids)
    # in passes: torch's softmax on CPU is faster, but off by 1e-5
    total = scores.sub_(largest).exp_().sum(dim=1, keepdim=True)
    nll = largest - target + total.log()
    if wants_gradient:
        scores.div_(total).scatter_add_(1, target_ids, torch.full_like(target, -1))
        if tanh is not None:
            scores.mul_(tanh.square_().neg_().add_(1))
        if logits.dtype == torch.float16:
            scores.mul_(_FLOAT16_SCALE)
        if scores.data_ptr() != logits.data_ptr():
            logits.copy_(scores)
    return nll[:, 0], (argmax == target_ids)[:, 0]
