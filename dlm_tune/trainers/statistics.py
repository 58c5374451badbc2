"""Sums that the training log and the evaluation are made of.

One row of statistics belongs to one row of the batch; all entries are sums, so rows, microbatches, evaluation samples
and processes add up. Noise levels are fractions of target tokens that are masked, in four equal buckets.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dlm_tune.diffusion import NoisyBatch

NUM_BUCKETS = 4
BUCKET_NAMES = ("00_25", "25_50", "50_75", "75_100")
NUM_COLUMNS = 6 + 3 * NUM_BUCKETS
_ROWS, _TIMESTEP, _NATS, _TARGETS, _MASKED, _TOP1 = range(6)


def row_statistics(token_nll: Tensor, is_top1: Tensor, noisy: NoisyBatch, target_mask: Tensor) -> Tensor:
    """Statistics of the rows of one corrupted batch.

    Args:
        token_nll: (N,) cross-entropy in nats of the masked tokens, in row-major order of `noisy.masked`.
        is_top1: (N,) bool, whether the model's first choice is the clean token.
        noisy: the corrupted batch, B rows.
        target_mask: (B, L) bool.

    Returns:
        (B, NUM_COLUMNS) float64.
    """
    num_targets, num_masked = target_mask.sum(dim=1).double(), noisy.masked.sum(dim=1).double()
    fraction = num_masked / num_targets.clamp(min=1)
    bucket = (fraction * NUM_BUCKETS).long().clamp(max=NUM_BUCKETS - 1)

    zeros = torch.zeros(len(target_mask), dtype=torch.float64, device=target_mask.device)
    nll = zeros.index_add(0, noisy.masked_rows, token_nll.detach().double())
    top1 = zeros.index_add(0, noisy.masked_rows, is_top1.double())
    in_bucket = torch.nn.functional.one_hot(bucket, NUM_BUCKETS).double()
    columns = [torch.ones_like(zeros), noisy.timesteps, noisy.weights * nll, num_targets, num_masked, top1]
    by_bucket = (in_bucket[:, None] * torch.stack([nll, top1, num_masked], dim=1)[:, :, None]).flatten(1)
    return torch.cat([torch.stack(columns, dim=1), by_bucket], dim=1)


def summarise(sums: Tensor) -> dict[str, float]:
    """Metrics from statistics summed over rows.

    Args:
        sums: (NUM_COLUMNS,) float64 on any device.

    Returns:
        `nelbo` (nats per target token), `masked_accuracy`, `mean_timestep`, `fraction_masked`, and for each
        noise-level bucket that has tokens `nll_masked_<bucket>` (nats per masked token, unweighted) and
        `accuracy_masked_<bucket>`.
    """
    values = sums.tolist()
    metrics = {
        "nelbo": values[_NATS] / max(values[_TARGETS], 1),
        "masked_accuracy": values[_TOP1] / max(values[_MASKED], 1),
        "mean_timestep": values[_TIMESTEP] / max(values[_ROWS], 1),
        "fraction_masked": values[_MASKED] / max(values[_TARGETS], 1),
    }
    nll, top1, masked = (values[6 + i * NUM_BUCKETS : 6 + (i + 1) * NUM_BUCKETS] for i in range(3))
    for name, bucket_nll, bucket_top1, count in zip(BUCKET_NAMES, nll, top1, masked, strict=True):
        if count:
            metrics[f"nll_masked_{name}"] = bucket_nll / count
            metrics[f"accuracy_masked_{name}"] = bucket_top1 / count
    return metrics


def nelbo_standard_error(statistics: Tensor) -> float:
    """Standard error over rows of the NELBO in nats per target token, a ratio of two sums (delta method).

    Args:
        statistics: (rows, NUM_COLUMNS) float64, each row summed over its evaluation samples.

    Returns:
        NaN for fewer than two rows.
    """
    rows = len(statistics)
    nats, targets = statistics[:, _NATS], statistics[:, _TARGETS]
    if rows < 2:
        return float("nan")
    residuals = nats - targets * (nats.sum() / targets.sum())
    return float((residuals.square().sum() * rows / (rows - 1)).sqrt() / targets.sum())


def evaluation_metrics(statistics: Tensor, row_index: Tensor) -> dict[str, float]:
    """Metrics of an evaluation; rows that sampling over processes repeated count once.

    Args:
        statistics: (rows, NUM_COLUMNS) float64, each row summed over its evaluation samples.
        row_index: (rows,), negative where there is no row.

    Returns:
        `nelbo` (also as `loss`, for `metric_for_best_model`) in nats per target token, an upper bound of the negative
        log-likelihood; `nelbo_standard_error` over rows; `perplexity_bound = exp(nelbo)`; `num_rows`; accuracies and
        losses by noise level.
    """
    statistics, row_index = statistics[row_index >= 0], row_index[row_index >= 0]
    order = row_index.argsort(stable=True)
    is_first = torch.ones_like(row_index, dtype=torch.bool)
    is_first[1:] = row_index[order][1:] != row_index[order][:-1]
    statistics = statistics[order][is_first]
    metrics = summarise(statistics.sum(dim=0))
    nelbo = metrics.pop("nelbo")
    for unused in ("mean_timestep", "fraction_masked"):
        metrics.pop(unused)
    return {
        "loss": nelbo,
        "nelbo": nelbo,
        "nelbo_standard_error": nelbo_standard_error(statistics),
        "perplexity_bound": math.exp(min(nelbo, 700.0)),
        "num_rows": float(len(statistics)),
        **metrics,
    }


def by_sequence(statistics: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Statistics and row indices as the Trainer gathers them: one entry a sequence of the data set.

    Returns:
        (R, C) and (R,) as they are; of packed rows (B, K, C) and (B, K), with K the largest number of rows in a
        sequence and index -1 where a sequence has fewer.
    """
    row_index = inputs["row_index"]
    if "packed_position" not in inputs:
        return statistics, row_index
    num_sequences, length = inputs["packed_shape"]
    sequence = inputs["packed_position"][:, 0] // length
    sizes = torch.bincount(sequence, minlength=num_sequences)
    place = torch.arange(len(sequence), device=sequence.device) - (sizes.cumsum(0) - sizes)[sequence]
    gathered = statistics.new_zeros(num_sequences, int(sizes.max()), statistics.shape[1])
    indices = row_index.new_full(gathered.shape[:2], -1)
    gathered[sequence, place] = statistics
    indices[sequence, place] = row_index
    return gathered, indices
