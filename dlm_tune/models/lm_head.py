"""The language-model head at chosen positions, without (B, L, V) logits.

For N selected positions and V tokens a dense computation holds several (N, V) float32 tensors; here chunks of at most
`MAX_CHUNK_LOGITS` logits exist at a time. A plain `nn.Linear` is scored by `fused_head`, which computes gradients in
the forward pass where it can. Any other head (adapters on it, quantised, hooked, partitioned by ZeRO-3 or FSDP2) is
called as a module on each chunk, and again in the backward pass.

The mask token's logit is not suppressed: LLaDA trains with it, and it is never a target, so the model learns that its
probability is zero. The sampler suppresses it. Only where the model's config says `excludes_mask_logit`, because its
authors' head has no such column, `exclude_mask_logit` takes it out of every softmax.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook as has_global_hook
from torch.utils.checkpoint import checkpoint

from dlm_tune.models.fused_head import (
    LinearHead,
    RecomputedScores,
    TokenScores,
    WeightedLoss,
    score_rows,
)

# 2**25 float32 logits are 128 MiB: 265 rows of LLaDA's vocabulary.
MAX_CHUNK_LOGITS = 2**25
_EXCLUDED_LOGIT = -30000.0  # float16 holds it


def score_targets(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    target_ids: Tensor,
    vocab_size: int,
    *,
    token_weights: Tensor | None = None,
    logit_softcap: float | None = None,
    max_chunk_logits: int | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the weighted loss, the targets' negative log-likelihoods, and whether each target is the largest logit.

    Args:
        head: module from (n, D) to (n, V).
        hidden: (N, D) hidden states of the predicting positions.
        target_ids: (N,) long.
        vocab_size: V, only to size the chunks.
        token_weights: (N,) float weights of the scores in the loss; constants.
        logit_softcap: logits become `cap * tanh(logits / cap)`.
        max_chunk_logits: largest number of logits held at a time (at least one row is); default MAX_CHUNK_LOGITS.

    Returns:
        Scalar float32 `sum(token_weights * nll)`, differentiable, or None without `token_weights`; (N,) float32 nats,
        differentiable only without `token_weights`; (N,) bool. Float64 hidden states give float64.

    Raises:
        RuntimeError: on a second backward pass through the loss of a plain linear head.
    """
    rows = max(1, (max_chunk_logits or MAX_CHUNK_LOGITS) // vocab_size)
    linear = plain_linear(head, hidden)
    if linear is None:
        nll, is_top1 = _score_by_calls(head, hidden, target_ids, rows, logit_softcap)
    else:
        tensors = LinearHead(linear.weight, linear.bias, logit_softcap, rows)
        head_is_trainable = linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad)
        if not (torch.is_grad_enabled() and (head_is_trainable or hidden.requires_grad)):
            nll, is_top1, *_ = score_rows(tensors, hidden, target_ids)
        elif token_weights is not None:
            weights = token_weights.detach()
            return WeightedLoss.apply(hidden, linear.weight, linear.bias, target_ids, weights, tensors)
        elif not head_is_trainable:
            nll, is_top1 = TokenScores.apply(hidden, target_ids, tensors)
        elif len(hidden) <= rows:
            nll, is_top1 = _score_chunk(linear, hidden, target_ids, logit_softcap)
        else:
            nll, is_top1 = RecomputedScores.apply(hidden, linear.weight, linear.bias, target_ids, tensors)
    if token_weights is None:
        return None, nll, is_top1
    return (nll * token_weights.detach().to(nll.dtype)).sum(), nll.detach(), is_top1


def plain_linear(head: Callable[[Tensor], Tensor], hidden: Tensor) -> nn.Linear | None:
    """The `nn.Linear` that calling `head` on `hidden` amounts to, if reading its weight is the same as calling it."""
    if type(head) is ModulesToSaveWrapper and not _is_altered(head):
        head = _active_module(head)
    if type(head) is not nn.Linear or _is_altered(head):
        return None
    for parameter in (head.weight, head.bias):
        if parameter is None:
            continue
        # a tensor subclass (DTensor, quantised) computes in its own way, and ZeRO-3 holds a part only
        if type(parameter) not in (nn.Parameter, Tensor) or hasattr(parameter, "ds_id"):
            return None
        if parameter.device != hidden.device:
            return None
        # without autocast, which leaves float64 alone, `nn.Linear` refuses to mix dtypes
        is_cast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
        if not is_cast and hidden.dtype != parameter.dtype:
            return None
    return head


def exclude_mask_logit(model: Any) -> None:
    """Make the mask token's probability zero, exactly and everywhere, by a constant bias of the model's linear head.

    The bias is not saved. It is finite, because -inf times a zero probability would be NaN, and so large that its
    exponential is 0 beside any other logit, in float64 too.
    """
    head = model.get_output_embeddings()
    bias = torch.zeros(head.out_features, dtype=head.weight.dtype, device=head.weight.device)
    bias[model.config.mask_token_id] = _EXCLUDED_LOGIT
    del head.bias
    head.register_buffer("bias", bias, persistent=False)


def project_positions(head: Callable[[Tensor], Tensor], hidden: Tensor, logit_softcap: float | None = None) -> Tensor:
    """Return logits (N, V) of the hidden states (N, D), capped as `cap * tanh(logits / cap)` where a cap is given."""
    return capped(head(hidden), logit_softcap)


def capped(logits: Tensor, logit_softcap: float | None) -> Tensor:
    """Return `cap * tanh(logits / cap)`, or the logits where no cap is given."""
    return logits if logit_softcap is None else (logits / logit_softcap).tanh() * logit_softcap


def _active_module(wrapper: Any) -> Any:
    """The module that peft's wrapper of a fully trained copy calls."""
    is_active = wrapper.active_adapters and not wrapper.disable_adapters
    is_active = is_active and all(name in wrapper.modules_to_save for name in wrapper.active_adapters)
    return wrapper.modules_to_save[wrapper.active_adapters[0]] if is_active else wrapper.original_module


def _is_altered(module: Any) -> bool:
    """Whether calling the module does more than its class says: hooks, or a `forward` set on the instance."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or has_global_hook()


def _score_by_calls(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    target_ids: Tensor,
    rows: int,
    logit_softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Call the head on each chunk of rows, and again in the backward pass if there is more than one chunk."""
    score = partial(_score_chunk, head, logit_softcap=logit_softcap)
    nll, is_top1 = score_in_chunks(score, (hidden, target_ids), rows, (head,))
    return nll, is_top1


def score_in_chunks(
    score: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], rows: int, heads: Sequence[Any]
) -> tuple[Tensor, ...]:
    """Return what `score(*tensors)` returns, computed on chunks of rows.

    Of more than one chunk nothing is kept for the backward pass, which computes the chunk again.

    Args:
        score: from tensors of n rows to tensors of n rows, row by row.
        tensors: each of N rows.
        rows: most rows of a chunk.
        heads: the heads that `score` calls; where a call is a collective, all ranks make equally many.
    """
    num_chunks = -(-len(tensors[0]) // rows)
    for head in heads:
        num_chunks = _same_on_all_ranks(head, num_chunks, tensors[0].device)
    if num_chunks <= 1:
        return score(*tensors)
    parts = []
    for index in range(num_chunks):
        chunk = [tensor[index * rows : (index + 1) * rows] for tensor in tensors]
        parts.append(checkpoint(score, *chunk, use_reentrant=False) if torch.is_grad_enabled() else score(*chunk))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _score_chunk(
    head: Callable[[Tensor], Tensor], hidden: Tensor, target_ids: Tensor, logit_softcap: float | None
) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    with torch.autocast(device_type=logits.device.type, enabled=False):
        scores = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), logit_softcap)
        nll = F.cross_entropy(scores, target_ids, reduction="none")
    return nll, scores.detach().argmax(dim=-1) == target_ids


def _same_on_all_ranks(head: Callable[[Tensor], Tensor], num_chunks: int, device: torch.device) -> int:
    """Where each call of the head is a collective (ZeRO-3, FSDP2), all ranks must make the same number of calls."""
    parameters = head.parameters() if isinstance(head, nn.Module) else ()
    is_partitioned = any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in parameters)
    if not (is_partitioned and dist.is_initialized() and dist.get_world_size() > 1):
        return num_chunks
    largest = torch.tensor(num_chunks, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
