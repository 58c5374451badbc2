"""The language-model head at chosen positions, without (B, L, V) logits.

For N selected positions and V tokens a dense computation holds several (N, V) float32 tensors; here chunks of at most
`MAX_CHUNK_LOGITS` logits exist at a time, and each is computed again in the backward pass. The head is always called
as a module, so that adapters on it and parameter gathering (ZeRO-3, FSDP) work.

The mask token's logit is not suppressed: LLaDA trains with it, and it is never a target, so the model learns that its
probability is zero. The sampler suppresses it.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# 2**25 float32 logits are 128 MiB: 265 rows of LLaDA's vocabulary.
MAX_CHUNK_LOGITS = 2**25


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
        token_weights: (N,) float weights of the scores in the loss.
        logit_softcap: logits become `cap * tanh(logits / cap)`.
        max_chunk_logits: largest number of logits held at a time (at least one row is); default MAX_CHUNK_LOGITS.

    Returns:
        Scalar float32 `sum(token_weights * nll)`, differentiable, or None without `token_weights`; (N,) float32 nats,
        differentiable only without `token_weights`; (N,) bool.
    """
    nll, is_top1 = _score(head, hidden, target_ids, vocab_size, max_chunk_logits)
    if token_weights is None:
        return None, nll, is_top1
    return (nll * token_weights.to(nll.dtype)).sum(), nll.detach(), is_top1


def _score(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    target_ids: Tensor,
    vocab_size: int,
    max_chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor]:
    rows = max(1, (max_chunk_logits or MAX_CHUNK_LOGITS) // vocab_size)
    num_chunks = _same_on_all_ranks(head, -(-hidden.shape[0] // rows), hidden.device)
    if num_chunks <= 1:
        return _score_chunk(head, hidden, target_ids)
    recompute = torch.is_grad_enabled()
    nlls, hits = [], []
    for index in range(num_chunks):
        chunk = slice(index * rows, (index + 1) * rows)
        inputs = (head, hidden[chunk], target_ids[chunk])
        # A head that computes its gradient in the forward pass would replace this line and need no recomputation.
        nll, hit = checkpoint(_score_chunk, *inputs, use_reentrant=False) if recompute else _score_chunk(*inputs)
        nlls.append(nll)
        hits.append(hit)
    return torch.cat(nlls), torch.cat(hits)


def project_positions(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Return logits (N, V) of the hidden states (N, D)."""
    return head(hidden)


def _score_chunk(head: Callable[[Tensor], Tensor], hidden: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    with torch.autocast(device_type=logits.device.type, enabled=False):
        nll = F.cross_entropy(logits.float(), target_ids, reduction="none")
    return nll, logits.detach().argmax(dim=-1) == target_ids


def _same_on_all_ranks(head: Callable[[Tensor], Tensor], num_chunks: int, device: torch.device) -> int:
    """Under ZeRO-3 each call of the head is a collective, so all ranks must make the same number of calls."""
    parameters = head.parameters() if isinstance(head, nn.Module) else ()
    is_partitioned = any(hasattr(parameter, "ds_id") for parameter in parameters)
    if not (is_partitioned and dist.is_initialized() and dist.get_world_size() > 1):
        return num_chunks
    largest = torch.tensor(num_chunks, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
