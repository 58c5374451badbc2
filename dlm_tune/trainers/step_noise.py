"""The noise and the loss weights of one optimiser step, made where all its microbatches are in hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlm_tune.diffusion import (
    NOISE_SCHEDULES,
    TIMESTEP_SAMPLERS,
    NoiseSchedule,
    NoiseStream,
    corrupt,
    count_items,
    counter_uniform,
    loss_weights,
    polynomial,
    random_lengths,
    token_weights,
)
from dlm_tune.trainers.diffusion_config import DEFAULT_CART_P, DEFAULT_NOISE_EPSILON, DiffusionConfig

# what is counted in each microbatch and process
_ROWS, _ITEMS, _TOKENS = range(3)


def corrupt_step(
    batches: list[dict[str, Any]],
    args: DiffusionConfig,
    *,
    step: int,
    epoch: int,
    mask_token_id: int,
    first_target_position: int = 0,
    rank: int = 0,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Add `noisy` (a `NoisyBatch`) and `loss_weights` (R, L) to the microbatches of an optimiser step.

    Timesteps depend on (noise_seed, step, number of the row in the global batch), mask bits on (noise_seed, epoch, row
    index, position): the noise of a row is the same for any number of processes, any microbatch size and any packing
    that make up the same global batch in the same order. Rows are numbered by microbatch, then process, then place.

    Args:
        batches: this process's microbatches as collated, on the device. Rows of plain text may be shortened here.
        args: names the noise and the weighting.
        step: optimiser step.
        epoch: number of the pass over the data; gives fresh masks in every epoch.
        mask_token_id: id of the mask token.
        first_target_position: 1 if the model's logits are shifted: a first token is never a target then.
        rank: this process.
        gather: stacks a tensor of every process along dimension 0; None for a single process.

    Returns:
        Scalar float64, attended tokens of the step over all processes.
    """
    for batch in batches:
        _shorten_rows(batch, args, epoch, first_target_position)
    counts = _count(batches, args, gather)
    rows = counts[:, :, _ROWS].long().T.cpu()  # (microbatches, processes)
    first_slots = (rows.flatten().cumsum(0) - rows.flatten()).view_as(rows)[:, rank].tolist()
    num_slots, num_items = int(rows.sum()), counts[:, :, _ITEMS].sum()
    schedule = noise_schedule(args)
    for batch, first_slot in zip(batches, first_slots, strict=True):
        input_ids, target_mask, attention_mask = batch["input_ids"], batch["target_mask"], batch["attention_mask"]
        slots = first_slot + torch.arange(len(input_ids), device=input_ids.device)
        positions = attention_mask.cumsum(dim=1) - 1  # within the row, whatever the padding
        batch["noisy"] = corrupt(
            input_ids,
            target_mask,
            TIMESTEP_SAMPLERS[args.timestep_sampling](args.noise_seed, step, slots, num_slots),
            counter_uniform(args.noise_seed, NoiseStream.MASK, epoch, batch["row_index"][:, None], positions),
            schedule=schedule,
            masking=args.masking,
            mask_token_id=mask_token_id,
            noise_epsilon=args.noise_epsilon or DEFAULT_NOISE_EPSILON,
        )
        weights = token_weights(
            batch["noisy"],
            target_mask,
            attention_mask,
            args.loss_weighting,
            geometric_p=args.cart_geometric_p or DEFAULT_CART_P,
        )
        batch["loss_weights"] = loss_weights(weights, target_mask, args.loss_normalization, num_items).float()
    return counts[:, :, _TOKENS].sum()


def _count(batches: list[dict[str, Any]], args: DiffusionConfig, gather: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(processes, microbatches, 3) float64: rows, items of the denominator and attended tokens."""
    counts = []
    for batch in batches:
        items = count_items(batch["target_mask"], args.loss_normalization)
        counts.append(torch.stack([items.new_tensor(len(batch["input_ids"])), items, batch["attention_mask"].sum()]))
    local = torch.stack(counts)[None]
    return local if gather is None else gather(local)


def noise_schedule(args: DiffusionConfig) -> NoiseSchedule:
    """The schedule that a configuration names."""
    if args.noise_schedule_power is not None:
        return polynomial(args.noise_schedule_power)
    return NOISE_SCHEDULES[args.noise_schedule]


def _shorten_rows(batch: dict[str, Any], args: DiffusionConfig, epoch: int, first_target_position: int) -> None:
    """Cut rows of plain text to a random length with `random_length_probability`; others stay whole."""
    if not args.random_length_probability:
        return
    attention_mask = batch["attention_mask"]
    num_context = (attention_mask.bool() & ~batch["target_mask"]).sum(dim=1)
    lengths = attention_mask.sum(dim=1)
    cut = random_lengths(args.noise_seed, epoch, batch["row_index"], lengths, args.random_length_probability)
    cut = torch.where(num_context <= first_target_position, cut, lengths)
    is_kept = attention_mask.cumsum(dim=1) <= cut[:, None]
    batch["attention_mask"] = attention_mask * is_kept
    batch["target_mask"] = batch["target_mask"] & is_kept
