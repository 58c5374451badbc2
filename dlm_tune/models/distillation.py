"""The score of masked tokens against a teacher under classifier-free guidance: two forwards distilled into one.

A teacher that is guided at sampling runs twice a step, on the prompt and on its masked version. Here a student is
trained to give the guided distribution

    p_guided ∝ p_cond^(1+w) p_uncond^(-w)    (Nie et al., arXiv 2410.18514, section 4; `guided_logits`)

in one forward, as Meng et al. (arXiv 2210.03142, section 3.1) distil guided diffusion of images. The loss of a masked
token is KL(p_guided || p_student), both over the whole vocabulary; p_guided of the mask token is zero, as in the
sampler.

The teacher hands over hidden states, (N, D) for each branch, and its head: logits of both branches and of the student
exist for one chunk of rows at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from dlm_tune.diffusion.guidance import guided_logits
from dlm_tune.models import lm_head

Head = Callable[[Tensor], Tensor]


class GuidedTargets(NamedTuple):
    """What a teacher says of N masked tokens, before its LM head.

    Attributes:
        cond_hidden: (N, D) hidden states that predict the tokens given the prompt.
        uncond_hidden: (N, D) the same with the prompt masked.
        guidance_scale: w.
        head: the teacher's LM head; None for the student's own without its adapters.
    """

    cond_hidden: Tensor
    uncond_hidden: Tensor
    guidance_scale: float
    head: Head | None = None


def score_against_teacher(
    head: Head,
    hidden: Tensor,
    target_ids: Tensor,
    token_weights: Tensor,
    guided: GuidedTargets,
    *,
    mask_token_id: int,
    vocab_size: int,
    logit_softcap: float | None = None,
    max_chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted divergence from the guided teacher, and the scores of the true tokens.

    Args:
        head: the student's LM head, from (n, D) to (n, V).
        hidden: (N, D) the student's hidden states of the predicting positions.
        target_ids: (N,) long, the true tokens.
        token_weights: (N,) float weights of the divergences in the loss; constants.
        guided: the teacher's side, constants.
        mask_token_id: the token that p_guided excludes.
        vocab_size: V, only to size the chunks.
        logit_softcap: logits of student and teacher become `cap * tanh(logits / cap)`.
        max_chunk_logits: largest number of logits of each branch held at a time (at least one row is).

    Returns:
        Scalar float32 `sum(token_weights * KL(p_guided || p_student))` in nats, differentiable; negative
        log-likelihoods (N,) of the true tokens under the student, and whether each is its largest logit (N,) bool, as
        in `score_targets`. Float64 hidden states give float64.
    """
    teacher_head = without_adapters(head) if guided.head is None else guided.head
    score = partial(
        _score_chunk,
        head,
        teacher_head,
        guidance_scale=guided.guidance_scale,
        mask_token_id=mask_token_id,
        logit_softcap=logit_softcap,
    )
    rows = max(1, (max_chunk_logits or lm_head.MAX_CHUNK_LOGITS) // vocab_size)
    tensors = (hidden, target_ids, guided.cond_hidden.detach(), guided.uncond_hidden.detach())
    divergence, nll, is_top1 = lm_head.score_in_chunks(score, tensors, rows, (head, teacher_head))
    return (divergence * token_weights.detach().to(divergence.dtype)).sum(), nll, is_top1


def without_adapters(head: Head) -> Head:
    """The LM head as it was before peft adapted it: the layer below LoRA, or the original of a trained copy."""
    if isinstance(head, ModulesToSaveWrapper):
        return head.original_module
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


def _score_chunk(
    head: Head,
    teacher_head: Head,
    hidden: Tensor,
    target_ids: Tensor,
    cond_hidden: Tensor,
    uncond_hidden: Tensor,
    *,
    guidance_scale: float,
    mask_token_id: int,
    logit_softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        cond, uncond = (_scores(teacher_head, states, logit_softcap) for states in (cond_hidden, uncond_hidden))
    scores = _scores(head, hidden, logit_softcap)
    with torch.autocast(device_type=scores.device.type, enabled=False):
        guided = guided_logits(cond, uncond, guidance_scale)
        guided[:, mask_token_id] = -torch.inf
        log_probabilities = scores.log_softmax(dim=-1)
        # takes probabilities: the logarithm of the mask token's is infinite
        divergence = F.kl_div(log_probabilities, guided.softmax(dim=-1), reduction="none").sum(dim=-1)
    nll = -log_probabilities.detach().gather(-1, target_ids[:, None])[:, 0]
    return divergence, nll, scores.detach().argmax(dim=-1) == target_ids


def _scores(head: Head, hidden: Tensor, logit_softcap: float | None) -> Tensor:
    """Capped logits (n, V) of at least float32."""
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.autocast(device_type=logits.device.type, enabled=False):
        return lm_head.capped(logits, logit_softcap)
