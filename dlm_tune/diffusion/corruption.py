"""The forward process: which target tokens are replaced by the mask token, and the NELBO weight of each row.

- `bernoulli`: each target token is masked independently with probability `p = 1 - alpha(t)`; weight
  `-alpha'(t) / (1 - alpha(t))`. LLaDA (arXiv 2502.09992, eq. 3), MDLM (arXiv 2406.07524, eq. 10).
- `exact_count`: a number of tokens `l` in 1..A is drawn and exactly `l` tokens are masked, chosen uniformly. For
  the linear schedule `l` is uniform and the weight is `A / l` (LLaDA, eq. 6). For any schedule, with
  `m(t) = (alpha(0) - alpha(t)) / (alpha(0) - alpha(1))` running from 0 to 1, `l = floor(m(t) A) + 1` has probability
  `q(l) = t(l / A) - t((l - 1) / A)` where `t` is the inverse of `m`, and the weight is `1 / (l q(l))`. The schedule
  is only the law of the counts: `q` is positive and sums to 1 for every schedule, so the expectation is exact also
  where `alpha(0) < 1` or `alpha(1) > 0`. Never an empty mask, no cut-off at small `t`, and a much lighter tail than
  `1 / p`.

Both have the same expectation, the continuous-time NELBO; `bernoulli` up to its cut-off. To first order that bias is
`noise_epsilon * NELBO - p(noise_epsilon) * H`, with `H` the sum over tokens of the cross-entropy given all others.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dlm_tune.diffusion.schedules import NoiseSchedule

MASKINGS = ("exact_count", "bernoulli")


@dataclass
class NoisyBatch:
    """Rows after the forward process.

    Attributes:
        noisy_input_ids: (B, L) int64, `input_ids` with the masked positions replaced by the mask token.
        masked: (B, L) bool, the masked positions. Tracked apart from the ids: the mask token may occur in the data.
        weights: (B,) float64, NELBO weight of every masked token of the row; 0 for a row without targets.
        timesteps: (B,) float64, the `t` that was used.
    """

    noisy_input_ids: Tensor
    masked: Tensor
    weights: Tensor
    timesteps: Tensor

    @cached_property
    def masked_rows(self) -> Tensor:
        """(N,) int64, the row of each masked token in row-major order; found once, since it synchronises a GPU."""
        return self.masked.nonzero()[:, 0]


def corrupt(
    input_ids: Tensor,
    target_mask: Tensor,
    timesteps: Tensor,
    uniforms: Tensor,
    *,
    schedule: NoiseSchedule,
    masking: str,
    mask_token_id: int,
    noise_epsilon: float = 1e-3,
) -> NoisyBatch:
    """Mask target tokens; all other tokens stay as they are.

    Args:
        input_ids: (B, L) int64 clean tokens.
        target_mask: (B, L) bool, tokens that may be masked and are scored.
        timesteps: (B,) float64 in [0, 1), uniform.
        uniforms: (B, L) float64 in [0, 1), independent; at a fixed row the masked set grows with `t`.
        schedule: one of `NOISE_SCHEDULES`.
        masking: `exact_count` or `bernoulli`.
        mask_token_id: id of the mask token.
        noise_epsilon: `bernoulli` only: `t` is moved to `[noise_epsilon, 1)` (LLaDA's `eps`); the second moment of
            the linear schedule's weight diverges as `log(1 / noise_epsilon)`, the bias is of order `noise_epsilon`.

    Raises:
        ValueError: unknown `masking`.
    """
    num_targets = target_mask.sum(dim=1)
    if masking == "bernoulli":
        timesteps = noise_epsilon + (1 - noise_epsilon) * timesteps
        masked = (uniforms < (1 - schedule.alpha(timesteps))[:, None]) & target_mask
        weights = schedule.weight(timesteps)
    elif masking == "exact_count":
        masked, weights = _mask_exact_count(target_mask, num_targets, timesteps, uniforms, schedule)
    else:
        raise ValueError(f"masking='{masking}' is unknown: choose 'exact_count' or 'bernoulli'")
    return NoisyBatch(
        noisy_input_ids=input_ids.masked_fill(masked, mask_token_id),
        masked=masked,
        weights=weights.where(num_targets > 0, 0.0),
        timesteps=timesteps,
    )


def _mask_exact_count(
    target_mask: Tensor, num_targets: Tensor, timesteps: Tensor, uniforms: Tensor, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    start, end = schedule.alpha(torch.zeros_like(timesteps)), schedule.alpha(torch.ones_like(timesteps))
    total = num_targets.clamp(min=1).to(torch.float64)
    count = ((start - schedule.alpha(timesteps)) / (start - end) * total).floor() + 1
    count = count.clamp(min=1).minimum(total)

    def time_at(clean: Tensor) -> Tensor:
        """The time at which `clean` of the row's `total` tokens are expected to be clean."""
        return schedule.inverse_alpha(end + (start - end) * (clean / total))

    probability = time_at(total - count) - time_at(total - count + 1)
    # the l targets with the smallest uniforms; a tie has probability 2**-53
    candidates = uniforms.masked_fill(~target_mask, torch.inf)
    threshold = candidates.sort(dim=1).values.gather(1, (count.long() - 1)[:, None])
    return (candidates <= threshold) & target_mask, 1 / (count * probability)
