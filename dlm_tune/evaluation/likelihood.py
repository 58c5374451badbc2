"""Likelihood bounds of a model, with standard errors and a fixed noise seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dlm_tune.diffusion import NELBOEstimate, enumerate_nelbo, noise_bank, summarise_replicates

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


@torch.no_grad()
def estimate_nelbo(
    model: Any,
    input_ids: Tensor,
    target_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_samples: int = 128,
    estimator: str = "exact_count",
    seed: int = 0,
    row_keys: Tensor | None = None,
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

    Returns:
        `NELBOEstimate` in nats, on the CPU. A single target token needs no sampling: its standard error is 0.

    Raises:
        ValueError: unknown estimator, or a shape or a value that cannot be scored.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator='{estimator}' is unknown: choose one of {', '.join(ESTIMATORS)}")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    target_mask = _check_targets(model, attention_mask, target_mask)
    num_tokens = target_mask.sum(dim=1)

    cross_entropy = partial(_cross_entropy, model, input_ids, attention_mask)
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
            (torch.arange(len(input_ids)) if row_keys is None else row_keys).to(input_ids.device),
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
) -> LogLikelihood:
    """Lower bounds on the log-likelihood of completions given their prompts, in nats.

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

    Raises:
        ValueError: `prompts`, `completions` and `row_keys` differ in number.
    """
    keys = range(len(prompts)) if row_keys is None else row_keys
    if not len(prompts) == len(completions) == len(keys):
        raise ValueError(
            f"{len(prompts)} prompts but {len(completions)} completions and {len(keys)} row_keys: give one completion "
            "(and one key, if any) per prompt"
        )
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
        estimates.append(
            estimate_nelbo(
                model,
                input_ids.to(device),
                target_mask.to(device),
                attention_mask.to(device),
                num_samples=num_samples,
                seed=seed,
                row_keys=torch.tensor(list(keys[start : start + batch_size])),
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
