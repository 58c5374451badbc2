"""Other forms of the likelihood bound of masked diffusion, and what ties them to the NELBO.

With `F(p)` = expected summed cross-entropy of a row whose targets are masked independently with probability `p`,

    continuous time (MDLM, arXiv 2406.07524, eq. 10)    NELBO   = integral over p in (0, 1) of F(p) / p
    T steps (D3PM, arXiv 2107.03006, absorbing state)   NELBO_T = sum over steps (p_t - p_s) / p_t * F(p_t)
    score entropy (SEDD, arXiv 2310.16834)              NELBO, term by term (RADD, arXiv 2406.03736)

`NELBO_T` is a right Riemann sum of the integral: it tends to the NELBO as T grows, and lies above it where a token is
the harder to predict the more is masked (true on average over data for the right denoiser, not for every row).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dlm_tune.diffusion.likelihood import enumerate_cross_entropy
from dlm_tune.diffusion.schedules import NoiseSchedule


def discrete_time_steps(schedule: NoiseSchedule, num_steps: int) -> tuple[Tensor, Tensor]:
    """The T-step bound as a weighted sum `sum_i weight_i * F(p_i)`.

    A step from `t` to `s < t` costs, for each masked token, the KL divergence of `q(x_s | x_t, x_0)` from the model's
    `p(x_s | x_t)`: `(alpha_s - alpha_t) / (1 - alpha_t)` times its cross-entropy. Besides the steps at `t = i / T`:

    - reconstruction: a token still masked at `t = 0` (where `alpha(0) < 1`) is predicted once more, with weight 1;
    - prior: the model starts from the fully masked row, and where `alpha(1) > 0` first reveals each token with that
      probability: `alpha(1) F(1)`. (A prior that is all mask tokens would make the bound infinite.)

    So the sum bounds `-log p` for any schedule. To train on it, draw a step with probability `1 / (T + 2)`, mask
    independently with probability `p_i`, and weigh by `(T + 2) weight_i`.

    Args:
        schedule: one of `NOISE_SCHEDULES`.
        num_steps: T, at least 1.

    Returns:
        Mask probabilities `p_i` and weights, (T + 2,) float64 each: reconstruction, the T steps, prior. The weights
        of reconstruction and prior are 0 for schedules that reach their ends.

    Raises:
        ValueError: `num_steps` below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    alpha = schedule.alpha(torch.arange(num_steps + 1, dtype=torch.float64) / num_steps)
    alpha = torch.cat([alpha.new_ones(1), alpha.clamp(0, 1), alpha.new_zeros(1)])
    mask_probability = 1 - alpha[1:]
    revealed = alpha[:-1] - alpha[1:]
    return mask_probability, (revealed / mask_probability).where(revealed > 0, 0.0)


def discrete_time_bound(
    cross_entropy: Callable[[Tensor, Tensor], Tensor],
    input_ids: Tensor,
    target_mask: Tensor,
    mask_token_id: int,
    schedule: NoiseSchedule,
    num_steps: int,
) -> float:
    """The T-step bound of one row in nats, exactly, by its `2**A - 1` masked sets.

    Args:
        cross_entropy: as `enumerate_cross_entropy`.
        input_ids: (L,) int64.
        target_mask: (L,) bool with `A <= 16` True entries.
        mask_token_id: id of the mask token.
        schedule: one of `NOISE_SCHEDULES`.
        num_steps: T.

    Raises:
        ValueError: more than 16 target tokens, or `num_steps` below 1.
    """
    mask_probability, weights = discrete_time_steps(schedule, num_steps)
    summed = enumerate_cross_entropy(cross_entropy, input_ids, target_mask, mask_token_id)
    size = torch.arange(len(summed), dtype=torch.float64)
    p = mask_probability[:, None]
    expected = (p**size * (1 - p) ** (size[-1] - size)) @ summed
    return float(weights @ expected)


def absorbing_log_scores(log_probs: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Log-scores of masked tokens from a denoiser: RADD's identity (arXiv 2406.03736, theorem 1).

    The score is the ratio of the marginals of `x_t` with and without token `v` in place of a mask:
    `s(v) = p(x_0 = v | visible tokens) * alpha_t / (1 - alpha_t)`. Only the factor depends on time.

    Args:
        log_probs: (N, V) log-probabilities of the denoiser at masked tokens, without the mask token.
        timesteps: (N,) float64 in (0, 1), where `0 < alpha_t < 1`.
        schedule: one of `NOISE_SCHEDULES`.

    Returns:
        (N, V) log-scores.
    """
    alpha_t = schedule.alpha(timesteps)
    return log_probs + (alpha_t / (1 - alpha_t)).log()[:, None]


def score_entropy(log_scores: Tensor, target_ids: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Integrand of SEDD's diffusion-weighted denoising score entropy (arXiv 2310.16834) at masked tokens.

    With `r = alpha_t / (1 - alpha_t)`, the true ratio of the clean token (0 for all others), it is

        sigma'(t) * [sum_v s(v) - r log s(x_0) + r (log r - 1)],   sigma(t) = -log alpha(t).

    Never negative, 0 only for the true ratios. For the scores of `absorbing_log_scores`, `sum_v s(v) = r`, all but the
    cross-entropy cancels and `sigma'(t) r` is the NELBO weight: the value is `weight(t) * cross_entropy`, token by
    token. Scores with a free normaliser (SEDD's parametrisation) can only be worse than the same scores normalised.

    Args:
        log_scores: (N, V) log of the model's scores of the tokens (not of the mask token) at masked positions.
        target_ids: (N,) int64 clean tokens, below V.
        timesteps: (N,) float64 in (0, 1), where `0 < alpha_t < 1`.
        schedule: one of `NOISE_SCHEDULES`.

    Returns:
        (N,) nats. Its sum over the masked tokens of a row, averaged over `t` and masks, is a bound on `-log p`.
    """
    alpha_t = schedule.alpha(timesteps)
    ratio = alpha_t / (1 - alpha_t)
    sigma_rate = schedule.weight(timesteps) / ratio
    target_log_score = log_scores.gather(1, target_ids[:, None])[:, 0]
    total_score = log_scores.logsumexp(dim=1).exp()
    return sigma_rate * (total_score - ratio * target_log_score + ratio * (ratio.log() - 1))
