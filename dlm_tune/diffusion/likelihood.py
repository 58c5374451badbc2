"""Estimates of the NELBO, an upper bound on the negative log-likelihood of a row, in nats.

The bound is that of the random-order mixture (LLaDA, arXiv 2502.09992, eq. 6; RADD, arXiv 2406.03736): with `CE(S)` =
summed cross-entropy of the masked set `S` given the rest,

    NELBO = E_{l ~ U{1..A}} E_{|S| = l} [(A / l) CE(S)] = sum over nonempty S of (|S|-1)! (A-|S|)! / A! * CE(S).

`enumerate_nelbo` evaluates the last form, `noise_bank` samples the first with strata whose counts are exactly uniform.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from dlm_tune.diffusion.corruption import NoisyBatch, corrupt
from dlm_tune.diffusion.noise import NoiseStream, counter_uniform
from dlm_tune.diffusion.schedules import NOISE_SCHEDULES


@dataclass
class NELBOEstimate:
    """An upper bound on `-log p(targets | rest)` of each row.

    Attributes:
        nats: (B,) float64, summed over the target tokens of the row.
        standard_error: (B,) float64, Monte-Carlo standard error of `nats`; 0 where the value is exact and NaN where
            a single replicate gives no estimate of it.
        num_tokens: (B,) int64, target tokens of the row.
    """

    nats: Tensor
    standard_error: Tensor
    num_tokens: Tensor


def noise_bank(
    input_ids: Tensor,
    target_mask: Tensor,
    row_keys: Tensor,
    *,
    seed: int,
    num_samples: int,
    mask_token_id: int,
    num_replicates: int = 1,
    positions: Tensor | None = None,
    masking: str = "exact_count",
    schedule: str = "linear",
    noise_epsilon: float = 1e-3,
) -> Iterator[NoisyBatch]:
    """The fixed noise with which rows are evaluated: the same for a row in any run, process or batch.

    Each replicate takes `num_samples / num_replicates` timesteps `t_j = (j / n + v) mod 1` with one uniform `v`:
    systematic sampling with a real offset, so every mask count is drawn with exactly its probability. (Rounding
    integer strata, as published evaluation scripts do, favours even counts.)

    Args:
        input_ids: (B, L) int64.
        target_mask: (B, L) bool, scored tokens.
        row_keys: (B,) int64, identity of each row; equal keys give equal noise.
        seed: noise seed.
        num_samples: corruptions per row.
        mask_token_id: id of the mask token.
        num_replicates: independent groups; divides `num_samples`.
        positions: (B, L) int64, positions within the row; by default columns, which is right without left padding.
        masking: as `corrupt`.
        schedule: name in `NOISE_SCHEDULES`.
        noise_epsilon: as `corrupt`.

    Yields:
        `num_samples` noisy batches; the first `num_samples / num_replicates` form the first replicate, and so on. The
        sum of `weights * cross-entropy` over the masked tokens of a row is one sample of its NELBO.

    Raises:
        ValueError: `num_replicates` does not divide `num_samples`.
    """
    if num_samples % num_replicates:
        raise ValueError(f"num_samples={num_samples} must be a multiple of num_replicates={num_replicates}")
    strata = num_samples // num_replicates
    if positions is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    for sample in range(num_samples):
        replicate, stratum = divmod(sample, strata)
        offset = counter_uniform(seed, NoiseStream.EVALUATION_TIMESTEP, row_keys, replicate)
        uniforms = counter_uniform(seed, NoiseStream.EVALUATION_MASK, row_keys[:, None], sample, positions)
        yield corrupt(
            input_ids,
            target_mask,
            (offset + stratum / strata) % 1.0,
            uniforms,
            schedule=NOISE_SCHEDULES[schedule],
            masking=masking,
            mask_token_id=mask_token_id,
            noise_epsilon=noise_epsilon,
        )


def summarise_replicates(samples: Tensor, num_replicates: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of NELBO samples drawn by `noise_bank`.

    The samples of one replicate depend on each other, so the error comes from the spread of replicate means.

    Args:
        samples: (B, num_samples) float64, in the order of `noise_bank`.
        num_replicates: as given to `noise_bank`.

    Returns:
        (B,) means and (B,) standard errors (NaN for a single replicate).
    """
    means = samples.view(samples.shape[0], num_replicates, -1).mean(dim=2)
    if num_replicates == 1:
        return means.mean(dim=1), torch.full_like(means[:, 0], math.nan)
    return means.mean(dim=1), means.std(dim=1) / math.sqrt(num_replicates)


def enumerate_cross_entropy(
    cross_entropy: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, target_mask: Tensor, mask_token_id: int
) -> Tensor:
    """`CE(S)` of one row summed over all masked sets of each size, in nats: every bound of the row is a sum of these.

    Args:
        cross_entropy: `(noisy_input_ids (1, L), masked (1, L)) -> (num_masked,)` cross-entropy of the masked tokens.
        input_ids: (L,) int64.
        target_mask: (L,) bool with `A <= 16` True entries.
        mask_token_id: id of the mask token.

    Returns:
        (A + 1,) float64 on the CPU; entry `l` is the sum over the sets of `l` masked tokens, entry 0 is 0.

    Raises:
        ValueError: more than 16 target tokens.
    """
    targets = target_mask.nonzero()[:, 0].tolist()
    total = len(targets)
    if total > 16:
        raise ValueError(f"enumeration needs 2**A forward passes: A={total} target tokens is more than 16")
    summed = torch.zeros(total + 1, dtype=torch.float64)
    for size in range(1, total + 1):
        for subset in combinations(targets, size):
            masked = torch.zeros_like(target_mask)
            masked[list(subset)] = True
            noisy_input_ids = input_ids.masked_fill(masked, mask_token_id)
            summed[size] += float(cross_entropy(noisy_input_ids[None], masked[None]).sum())
    return summed


def enumerate_nelbo(
    cross_entropy: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, target_mask: Tensor, mask_token_id: int
) -> float:
    """The exact NELBO of one row by its `2**A - 1` masked sets, in nats.

    Arguments and errors as `enumerate_cross_entropy`.
    """
    summed = enumerate_cross_entropy(cross_entropy, input_ids, target_mask, mask_token_id).tolist()
    total = len(summed) - 1
    # (l - 1)! (A - l)! / A! = 1 / (l * (A choose l))
    return sum(summed[size] / (size * math.comb(total, size)) for size in range(1, total + 1))
