"""Classifier-free guidance without a classifier and without paired data: what its two branches see and how they mix.

The conditional branch is the model on (prompt, noisy answer). The unconditional branch is the same model on the same
sequence with the prompt masked: a masked diffusion model that was trained on text without prompts already knows
`p(answer)`, so that no condition has to be dropped in training (unsupervised classifier-free guidance: Nie et al.,
"Scaling up Masked Diffusion Models on Text", arXiv 2410.18514, section 4; Ho and Salimans, arXiv 2207.12598).

Training and sampling call the same `mask_prompt`, so the branch that is sampled is the branch that was trained.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def guidance_keep_token_ids(config: Any) -> list[int]:
    """Return the prompt tokens that the unconditional branch sees; none unless the model's config says so."""
    return list(getattr(config, "guidance_keep_token_ids", None) or [])


def mask_prompt(
    input_ids: Tensor, prompt_mask: Tensor, mask_token_id: int, keep_token_ids: Collection[int] = ()
) -> Tensor:
    """Return the sequence that the unconditional branch sees: prompt tokens replaced by the mask token.

    Length, positions and attention stay as they are, so the branch still knows where the answer begins.

    Args:
        input_ids: (B, L) int64.
        prompt_mask: (B, L) bool, tokens of the condition; padding must not be marked.
        mask_token_id: id of the mask token.
        keep_token_ids: ids that stay visible in the prompt, such as BOS and the headers of a chat template
            (`config.guidance_keep_token_ids`).
    """
    hidden = prompt_mask
    if keep_token_ids:
        kept = torch.tensor(sorted(keep_token_ids), device=input_ids.device)
        hidden = prompt_mask & ~torch.isin(input_ids, kept)
    return input_ids.masked_fill(hidden, mask_token_id)


def guided_logits(cond_logits: Tensor, uncond_logits: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Return `uncond + (1 + w)(cond - uncond)`, whose softmax is proportional to `p_cond^(1+w) p_uncond^(-w)`.

    Logits serve as well as log-probabilities: a constant per branch and position vanishes in the normalisation. Remove
    the mask token and suppressed tokens from the RESULT. Where a branch excludes a token (-inf, or the least number of
    its type) the result is the limit of the formula, without NaN: a token that the conditional branch excludes stays
    excluded for w > -1.

    Args:
        cond_logits: (N, V) of any float type.
        uncond_logits: (N, V).
        guidance_scale: w; 0 gives the conditional branch, -1 the unconditional one. A number, or (N,).

    Returns:
        (N, V) unnormalised log-probabilities, float32 (float64 if a branch is), finite.
    """
    dtype = torch.promote_types(torch.promote_types(cond_logits.dtype, uncond_logits.dtype), torch.float32)
    # finite, so that no difference is inf - inf; in float32's range, so that dividing by a temperature is safe later
    limits = torch.finfo(torch.float32)
    cond, uncond = (logits.to(dtype).clamp(min=limits.min) for logits in (cond_logits, uncond_logits))
    # 1 + w is rounded once, so that a row's own scale gives what the same scale of all rows gives
    weight = 1 + (guidance_scale.double()[:, None] if isinstance(guidance_scale, Tensor) else guidance_scale)
    # the branch itself where w is 0 or -1, not its rounding
    guided = uncond.lerp_(cond, torch.as_tensor(weight, dtype=dtype, device=cond.device))
    return guided.clamp_(limits.min, limits.max)
