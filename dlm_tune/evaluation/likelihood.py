"""Likelihood bounds of a model, with standard errors and a fixed noise seed.

Under guidance a masked token is scored by `p_cond^(1 + w) p_uncond^(-w)`, normalised, as the sampler draws it. The sum
then bounds the likelihood under guided sampling in random order, one token a step. For w other than 0 and -1 it bounds
neither the likelihood under the model nor that under the tilted joint `p(x | c)^(1 + w) p(x)^(-w)`, whose conditionals
the guided ones are not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dlm_tune.diffusion import (
    NELBOEstimate,
    enumerate_nelbo,
    guidance_keep_token_ids,
    guided_logits,
    mask_prompt,
    noise_bank,
    summarise_replicates,
)
from dlm_tune.models.lm_head import MAX_CHUNK_LOGITS, project_positions, score_in_chunks

ESTIMATORS = ("exact_count", "bernoulli", "enumeration")
MAX_REPLICATES = 16


@dataclass
class LogLikelihood:
    """Lower bounds on `log p(completion | prompt)`.

    Attributes:
        log_likelihood: (n,) float64, `-NELBO` in nats, summed over the completion's tokens.
        standard_error: (n,) float64, Monte-Carlo standard error.
        num_tokens: (n,) int64, tokens of the completions.
    """

    log_likelihood: Tensor
    standard_error: Tensor
    num_tokens: Tensor


def estimate_nelbo(
    model: Any,
    input_ids: Tensor,
    target_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_samples: int = 128,
    estimator: str = "exact_count",
    seed: int = 0,
    row_keys: Tensor | None = None,
    guidance_scale: float = 0.0,
) -> NELBOEstimate:
    """Upper bound on the negative log-likelihood of the target tokens of each row given its other tokens.

    Args:
        model: a model of `load_model`; its dropout is switched off for the call.
        input_ids: (B, L) int64.
        target_mask: (B, L) bool, tokens that are scored; by default all attended tokens (without the first one if
            the model's logits are shifted, which has no predictor).
        attention_mask: (B, L), 1 where attended; by default all.
        num_samples: forward passes per row. With several replicates of strata, so that the error can be estimated.
        estimator: `exact_count` (LLaDA eq. 6), `bernoulli` (eq. 3) or `enumeration` (exact, `2**A` passes, A <= 16).
        seed: noise seed; two models evaluated with one seed see the same noise.
        row_keys: (B,) int64, identity of each row in its noise; by default its place in the batch.
        guidance_scale: w of classifier-free guidance, which strengthens the condition: attended tokens that are not
            targets. Doubles the cost. For w other than 0 and -1 the bound is not one on the model's likelihood, but on
            that of guided sampling in random order.

    Returns:
        `NELBOEstimate` in nats, on the CPU. A single target token needs no sampling: its standard error is 0.

    Raises:
        ValueError: unknown estimator, a shape or a value that cannot be scored, or guidance of rows that have no
            condition.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    target_mask = _check_targets(model, attention_mask, target_mask)
    if guidance_scale != 0:
        without_condition = _without_condition(model, input_ids, attention_mask.bool() & ~target_mask)
        _check_guidance(guidance_scale, not without_condition.equal(input_ids))
    keys = torch.arange(len(input_ids)) if row_keys is None else row_keys
    return _estimate(model, input_ids, target_mask, attention_mask, keys, num_samples, estimator, seed, guidance_scale)


@torch.no_grad()
def _estimate(
    model: Any,
    input_ids: Tensor,
    target_mask: Tensor,
    attention_mask: Tensor,
    row_keys: Tensor,
    num_samples: int,
    estimator: str,
    seed: int,
    guidance_scale: float,
) -> NELBOEstimate:
    """As `estimate_nelbo`, whether or not a row has a condition."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator='{estimator}' is unknown: choose one of {', '.join(ESTIMATORS)}")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    num_tokens = target_mask.sum(dim=1)
    cross_entropy = partial(_cross_entropy, model, input_ids, attention_mask)
    if guidance_scale != 0:
        condition = attention_mask.bool() & ~target_mask
        cross_entropy = partial(
            _guided_cross_entropy, model, input_ids, attention_mask, condition, float(guidance_scale)
        )
    was_training = model.training
    model.eval()
    try:
        if estimator == "enumeration":
            nats = torch.tensor(
                [
                    enumerate_nelbo(partial(cross_entropy, slice(i, i + 1)), row, targets, model.config.mask_token_id)
                    for i, (row, targets) in enumerate(zip(input_ids, target_mask, strict=True))
                ],
                dtype=torch.float64,
            )
            return NELBOEstimate(nats, torch.zeros_like(nats), num_tokens.cpu())
        # four strata a replicate where there are samples for it: strata lower the variance, replicates measure it
        most = max(2, min(MAX_REPLICATES, num_samples // 4))
        replicates = next(r for r in range(most, 0, -1) if num_samples % r == 0)
        bank = noise_bank(
            input_ids,
            target_mask,
            row_keys.to(input_ids.device),
            seed=seed,
            num_samples=num_samples,
            num_replicates=replicates,
            mask_token_id=model.config.mask_token_id,
            positions=attention_mask.cumsum(dim=1) - 1,
            masking=estimator,
        )
        samples = []
        for noisy in bank:
            nll = cross_entropy(slice(None), noisy.noisy_input_ids, noisy.masked)
            samples.append(noisy.weights * torch.zeros_like(noisy.weights).index_add(0, noisy.masked_rows, nll))
    finally:
        model.train(was_training)
    nats, standard_error = summarise_replicates(torch.stack(samples, dim=1), replicates)
    if estimator == "exact_count":
        standard_error = standard_error.where(num_tokens > 1, 0.0)
    return NELBOEstimate(nats.cpu(), standard_error.cpu(), num_tokens.cpu())


def _cross_entropy(
    model: Any, input_ids: Tensor, attention_mask: Tensor, rows: slice, noisy_input_ids: Tensor, masked: Tensor
) -> Tensor:
    """(N,) float64 cross-entropy of the masked tokens of some rows."""
    return model(
        input_ids=noisy_input_ids, attention_mask=attention_mask[rows], target_ids=input_ids[rows], target_mask=masked
    ).token_nll.double()


def _guided_cross_entropy(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    condition: Tensor,
    guidance_scale: float,
    rows: slice,
    noisy_input_ids: Tensor,
    masked: Tensor,
) -> Tensor:
    """(N,) float64 cross-entropy of the masked tokens under guidance, with the mask token excluded."""
    without_condition = _without_condition(model, noisy_input_ids, condition[rows])
    hidden = model(
        input_ids=torch.cat([noisy_input_ids, without_condition]),
        attention_mask=attention_mask[rows].repeat(2, 1),
        position_mask=masked.repeat(2, 1),
        wants_hidden=True,
    ).last_hidden_state
    head = model.get_output_embeddings()
    score = partial(_score_guided, model.config, head, guidance_scale)
    chunk = max(1, MAX_CHUNK_LOGITS // model.config.vocab_size)
    return score_in_chunks(score, (*hidden.chunk(2), input_ids[rows][masked]), chunk, (head,))[0].double()


def _score_guided(
    config: Any, head: Any, guidance_scale: float, cond_hidden: Tensor, uncond_hidden: Tensor, target_ids: Tensor
) -> tuple[Tensor]:
    softcap = getattr(config, "final_logit_softcapping", None)
    cond, uncond = (project_positions(head, hidden, softcap) for hidden in (cond_hidden, uncond_hidden))
    guided = guided_logits(cond, uncond, guidance_scale)
    guided[:, config.mask_token_id] = -torch.inf
    return (F.cross_entropy(guided, target_ids, reduction="none"),)


def _without_condition(model: Any, input_ids: Tensor, condition: Tensor) -> Tensor:
    """The rows as the unconditional branch sees them."""
    return mask_prompt(input_ids, condition, model.config.mask_token_id, guidance_keep_token_ids(model.config))


def _check_guidance(guidance_scale: float, has_condition: bool) -> None:
    if not math.isfinite(guidance_scale):
        raise ValueError(
            f"guidance_scale={guidance_scale} is no power of a probability. Use a finite number; 0 is none."
        )
    if not has_condition:
        raise ValueError(
            f"guidance_scale={guidance_scale} has nothing to strengthen: no row has a condition (prompt tokens beside "
            "those that always stay visible). Use guidance_scale=0."
        )


def _check_targets(model: Any, attention_mask: Tensor, target_mask: Tensor | None) -> Tensor:
    attended = attention_mask.bool()
    if target_mask is None:
        target_mask = attended.clone()
        if model.config.logits_shift:
            target_mask[torch.arange(len(attended), device=attended.device), attended.int().argmax(dim=1)] = False
        return target_mask
    if target_mask.shape != attention_mask.shape:
        raise ValueError(
            f"target_mask has shape {tuple(target_mask.shape)} but the rows have shape {tuple(attention_mask.shape)}"
        )
    if bool((target_mask & ~attended).any()):
        raise ValueError("target_mask marks padding (positions where attention_mask is 0); only attended tokens count")
    first = attended.int().argmax(dim=1, keepdim=True)
    if model.config.logits_shift and bool(target_mask.gather(1, first).any()):
        raise ValueError(
            "target_mask marks the first token of a row, which has no predictor: this model's logits are shifted "
            "right by one. Prepend a BOS token or leave the first token out of target_mask."
        )
    return target_mask


def log_likelihood(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    num_samples: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    row_keys: Sequence[int] | None = None,
    show_progress: bool = False,
    guidance_scale: float = 0.0,
) -> LogLikelihood:
    """Lower bounds on the log-likelihood of completions given their prompts, in nats.

    With guidance they are bounds for guided sampling in random order, not for the model (unless w is 0, or -1, which
    ignores the prompt), nor for the joint distribution `p(x | c)^(1 + w) p(x)^(-w)`: use them to rank answers.

    Args:
        model: a model of `load_model`.
        prompts: token ids of each prompt; may be empty, unless the model's logits are shifted.
        completions: token ids of each completion; an empty one scores 0.
        num_samples: forward passes per row (a one-token completion is exact whatever the number).
        seed: noise seed; the noise of pair `i` is keyed by `(seed, row_keys[i])`, whatever the batch size.
        batch_size: rows per forward pass.
        row_keys: 64-bit integers, by default 0, 1, ...; give pairs that are compared with each other one key, so that
            they are scored under the same noise.
        show_progress: a progress bar over the batches.
        guidance_scale: w of classifier-free guidance, which strengthens the prompt and doubles the cost; it changes
            nothing for pairs without a prompt.

    Raises:
        ValueError: `prompts`, `completions` and `row_keys` differ in number, or guidance where no prompt is given.
    """
    keys = range(len(prompts)) if row_keys is None else row_keys
    if not len(prompts) == len(completions) == len(keys):
        raise ValueError(
            f"{len(prompts)} prompts but {len(completions)} completions and {len(keys)} row_keys: give one completion "
            "(and one key, if any) per prompt"
        )
    if guidance_scale != 0:
        kept = set(guidance_keep_token_ids(model.config))
        _check_guidance(guidance_scale, any(set(prompt) - kept for prompt in prompts))
    device = next(model.parameters()).device
    estimates = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="Scoring", unit="batch", disable=not show_progress):
        pairs = list(zip(prompts[start : start + batch_size], completions[start : start + batch_size], strict=True))
        length = max(len(prompt) + len(completion) for prompt, completion in pairs)
        input_ids = torch.zeros(len(pairs), max(length, 1), dtype=torch.long)
        attention_mask, target_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(pairs):
            end = len(prompt) + len(completion)
            input_ids[row, :end] = torch.tensor([*prompt, *completion], dtype=torch.long)
            attention_mask[row, :end] = 1
            target_mask[row, len(prompt) : end] = True
        input_ids, attention_mask, target_mask = (x.to(device) for x in (input_ids, attention_mask, target_mask))
        target_mask = _check_targets(model, attention_mask, target_mask)
        batch_keys = torch.tensor(list(keys[start : start + batch_size]))
        estimates.append(
            _estimate(
                model,
                input_ids,
                target_mask,
                attention_mask,
                batch_keys,
                num_samples,
                "exact_count",
                seed,
                guidance_scale,
            )
        )
    if not estimates:
        empty = torch.zeros(0, dtype=torch.float64)
        return LogLikelihood(empty, empty, empty.long())
    return LogLikelihood(
        log_likelihood=-torch.cat([estimate.nats for estimate in estimates]),
        standard_error=torch.cat([estimate.standard_error for estimate in estimates]),
        num_tokens=torch.cat([estimate.num_tokens for estimate in estimates]),
    )
