"""Masked (absorbing-state) diffusion in plain torch: noise, schedules, corruption, losses, likelihood bounds.

Notation: `R` rows (`B` where they are a batch of sequences), `L` positions, `A` maskable target tokens of a row, `t`
in [0, 1], `alpha_t` = probability that a token is still clean at `t`, mask probability `p = 1 - alpha_t`. Nothing here
imports from the rest of the package.
"""

from dlm_tune.diffusion.bounds import absorbing_log_scores, discrete_time_bound, discrete_time_steps, score_entropy
from dlm_tune.diffusion.classifier_guidance import ClassifierGuidance, ClassifierLogProb, classifier_guided_logits
from dlm_tune.diffusion.corruption import MASKINGS, NoisyBatch, corrupt
from dlm_tune.diffusion.guidance import guidance_keep_token_ids, guided_logits, mask_prompt
from dlm_tune.diffusion.likelihood import (
    NELBOEstimate,
    enumerate_cross_entropy,
    enumerate_nelbo,
    noise_bank,
    summarise_replicates,
)
from dlm_tune.diffusion.losses import NORMALIZATIONS, count_items, loss_weights
from dlm_tune.diffusion.noise import NoiseStream, counter_uniform
from dlm_tune.diffusion.objectives import LOSS_WEIGHTINGS, token_weights
from dlm_tune.diffusion.random_length import random_lengths
from dlm_tune.diffusion.schedules import NOISE_SCHEDULES, NoiseSchedule, geometric, polynomial
from dlm_tune.diffusion.timesteps import TIMESTEP_SAMPLERS

__all__ = [
    "LOSS_WEIGHTINGS",
    "MASKINGS",
    "NOISE_SCHEDULES",
    "NORMALIZATIONS",
    "TIMESTEP_SAMPLERS",
    "ClassifierGuidance",
    "ClassifierLogProb",
    "NELBOEstimate",
    "NoiseSchedule",
    "NoiseStream",
    "NoisyBatch",
    "absorbing_log_scores",
    "classifier_guided_logits",
    "corrupt",
    "count_items",
    "counter_uniform",
    "discrete_time_bound",
    "discrete_time_steps",
    "enumerate_cross_entropy",
    "enumerate_nelbo",
    "geometric",
    "guidance_keep_token_ids",
    "guided_logits",
    "loss_weights",
    "mask_prompt",
    "noise_bank",
    "polynomial",
    "random_lengths",
    "score_entropy",
    "summarise_replicates",
    "token_weights",
]
