"""What `dlm-tune inspect --estimate` computes of a recipe's data and of its training steps."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from dlm_tune.commands.inspect_batch import noise_bucket
from dlm_tune.data import PackedRows, UnpairedMixture
from dlm_tune.data.rows import IGNORED_LABEL
from dlm_tune.diffusion import NoiseSchedule
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from dlm_tune.trainers.statistics import NUM_BUCKETS
from dlm_tune.trainers.step_noise import noise_schedule

MAX_SAMPLED_STEPS = 50
MAX_SAMPLED_ROWS = 4000
_BATCH_SIZE = 1000
_GRID = 4096


@dataclass(frozen=True)
class DataFigures:
    """The training rows as they go into batches.

    Attributes:
        lengths: (rows,) tokens, with the EOS that the collator adds to a row by itself.
        num_targets: (rows,) targets among them.
        unigram_entropy: nats per target of the targets' own frequencies, each target weighted as in the loss: alike
            with `loss_normalization: tokens`, by 1 / targets of its row with `sequences`.
        entropy_bias: how much a finite sample lowers it on average (Miller and Madow): (kinds - 1) / (2 n), with n
            targets (with unequal weights, their effective number).
        num_kinds: different tokens among the targets.
    """

    lengths: np.ndarray
    num_targets: np.ndarray
    unigram_entropy: float
    entropy_bias: float
    num_kinds: int


@dataclass(frozen=True)
class StepFigures:
    """Means over the first optimiser steps of this process, with the noise that training uses.

    Attributes:
        num_sampled: steps that were looked at.
        rows: rows.
        positions: what the model computes: sequences times their length, padding included.
        tokens: attended tokens.
        targets: supervised tokens.
        masked: expected masked tokens; over the noise it is computed, over the rows sampled.
        weight_mean: sum of the loss weights of a step: the loss of a model with 1 nat at every token.
        weight_deviation: its standard deviation over steps.
        bucket_share: share of the rows in each noise level.
        is_padded: whether some microbatch holds padding, or documents that must not see each other.
        steps_per_epoch: optimiser steps.
        total_steps: optimiser steps of the run.
    """

    num_sampled: int
    rows: float
    positions: float
    tokens: float
    targets: float
    masked: float
    weight_mean: float
    weight_deviation: float
    bucket_share: list[float]
    is_padded: bool
    steps_per_epoch: int
    total_steps: int

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        return 1 - self.tokens / self.positions


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect what `dlm_tune.data` logs of rows that are left out or cut, instead of printing it."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dlm_tune.data")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def training_rows(trainer: DiffusionTrainer) -> Dataset:
    """The rows, packed or not; unpaired rows among them as one pass over the others has them."""
    dataset = trainer.train_dataset
    if isinstance(dataset, UnpairedMixture):
        return dataset.one_pass()
    return dataset.rows if isinstance(dataset, PackedRows) else dataset


def data_figures(trainer: DiffusionTrainer) -> DataFigures:
    """Count the training rows. With `eos_policy: pad_to_max`, EOS that depends on a row's batch is not among them."""
    rows, collator = training_rows(trainer), trainer.data_collator
    if collator.eos_policy == "pad_to_max":
        collator = replace(collator, eos_policy="one")
    lengths = collator.row_lengths(rows)
    by_row = trainer.args.loss_normalization == "sequences"
    counts = np.zeros(trainer.vocab_size)
    targets, weight, squares, start = [np.zeros(0, dtype=np.int64)], 0.0, 0.0, 0
    for table in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=_BATCH_SIZE):
        plain = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
        labels = pc.list_flatten(table["labels"]).to_numpy()
        row_of = np.repeat(np.arange(len(plain)), plain)
        is_target = labels != IGNORED_LABEL
        added = lengths[start : start + len(plain)] - plain
        num_targets = np.bincount(row_of[is_target], minlength=len(plain)) + added
        of_row = 1 / np.maximum(num_targets, 1) if by_row else np.ones(len(plain))
        counts += np.bincount(labels[is_target], weights=of_row[row_of[is_target]], minlength=len(counts))
        counts[collator.eos_token_id] += (added * of_row).sum()
        weight += float((num_targets * of_row).sum())
        squares += float((num_targets * of_row**2).sum())
        targets.append(num_targets)
        start += len(plain)
    shares = counts[counts > 0] / counts.sum()
    return DataFigures(
        lengths=lengths,
        num_targets=np.concatenate(targets),
        unigram_entropy=float(-(shares * np.log(shares)).sum()),
        entropy_bias=(len(shares) - 1) / (2 * weight**2 / squares),
        num_kinds=len(shares),
    )


def step_figures(trainer: DiffusionTrainer) -> StepFigures:
    """Look at the first steps of the run, at most `MAX_SAMPLED_STEPS` of them, or `MAX_SAMPLED_ROWS` rows."""
    config = trainer.args
    loader = trainer.get_train_dataloader()
    per_epoch = max(1, math.ceil(len(loader) / config.gradient_accumulation_steps))
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    iterator = iter(loader)
    sums, weights, buckets, is_padded = np.zeros(5), [], torch.zeros(NUM_BUCKETS), False
    for step in range(min(per_epoch, MAX_SAMPLED_STEPS)):
        trainer.state.global_step = step  # the noise depends on it
        batches, _ = trainer.get_batch_samples(iterator, config.gradient_accumulation_steps, config.device)
        weights.append(sum(float(batch["loss_weights"].double().sum()) for batch in batches))
        for batch in batches:
            num_sequences, length = batch.get("packed_shape", batch["input_ids"].shape)
            num_targets = batch["target_mask"].sum(dim=1).cpu()
            num_tokens = int(batch["attention_mask"].sum())
            masked = float(expected_masked(num_targets, config).sum())
            size = int(num_sequences) * int(length)
            sums += [len(num_targets), size, num_tokens, int(num_targets.sum()), masked]
            is_padded |= num_tokens < size or len(num_targets) > num_sequences
            bucket = noise_bucket(batch["noisy"].masked.sum(dim=1).cpu(), num_targets)[num_targets > 0]
            buckets += torch.bincount(bucket, minlength=NUM_BUCKETS)
        if sums[0] >= MAX_SAMPLED_ROWS:
            break
    rows, positions, tokens, targets, masked = (sums / len(weights)).tolist()
    return StepFigures(
        num_sampled=len(weights),
        rows=rows,
        positions=positions,
        tokens=tokens,
        targets=targets,
        masked=masked,
        weight_mean=float(np.mean(weights)),
        weight_deviation=float(np.std(weights, ddof=1)) if len(weights) > 1 else math.nan,
        bucket_share=(buckets / max(float(buckets.sum()), 1)).tolist(),
        is_padded=is_padded,
        steps_per_epoch=per_epoch,
        total_steps=total,
    )


def expected_masked(num_targets: Tensor, config: DiffusionConfig) -> Tensor:
    """Expected number of masked tokens of rows with so many targets, over `t`.

    Args:
        num_targets: (R,) integers.
        config: names schedule and masking.

    Returns:
        (R,) float64.
    """
    schedule: NoiseSchedule = noise_schedule(config)
    t = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
    if config.masking == "bernoulli":
        smallest = config.noise_epsilon or 0.0
        return num_targets.double() * (1 - schedule.alpha(smallest + (1 - smallest) * t)).mean()
    # exact count: floor(p A) + 1 of A, at most A
    sizes, place = num_targets.unique(return_inverse=True)
    masked = 1 - schedule.alpha(t)
    expected = [float(((masked * size).floor() + 1).clamp(max=size).mean()) for size in sizes.tolist()]
    return torch.tensor(expected, dtype=torch.float64)[place]
