"""The noise and the loss weights of one optimiser step, made where all its microbatches are in hand."""

from collections.abc import Callable, Collection
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
    mask_prompt,
    polynomial,
    random_lengths,
    token_weights,
)
from dlm_tune.models.annealing import RightContext, right_context_share
from dlm_tune.trainers.diffusion_config import DEFAULT_CART_P, DEFAULT_NOISE_EPSILON, DiffusionConfig
from dlm_tune.trainers.model_inputs import is_unpaired, prompt_mask

# what is counted in each microbatch and process
_ROWS, _ITEMS, _TOKENS, _UNPAIRED_ROWS, _UNPAIRED_ITEMS = range(5)


def corrupt_step(
    batches: list[dict[str, Any]],
    args: DiffusionConfig,
    *,
    step: int,
    epoch: int,
    mask_token_id: int,
    first_target_position: int = 0,
    keep_token_ids: Collection[int] = (),
    rank: int = 0,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Add `noisy`, `loss_weights`, `row_items` and `prompt_hidden` to the microbatches of an optimiser step.

    That is a `NoisyBatch`; the weight of each token in the loss (R, L); the `num_items` of each row (R,), and whether
    its prompt is masked (R,). While attention is annealed, also a `right_context`.

    Timesteps depend on (noise_seed, step, number of the row in the global batch), mask bits on (noise_seed, epoch, row
    index, position): the noise of a row is the same for any number of processes, any microbatch size and any packing
    that make up the same global batch in the same order. Rows are numbered by microbatch, then process, then place.

    The prompts of unpaired rows, and of the rows that `prompt_dropout` draws, are masked as guidance masks them at
    sampling; they are no targets. The prompts of the rows that `prompt_noising` draws become targets. With unpaired
    rows the loss of the step is `(rows_p / rows) loss_p + (rows_u / rows) loss_u`, each part with its own denominator.

    Args:
        batches: this process's microbatches as collated, on the device. Rows of plain text may be shortened here.
        args: names the noise and the weighting.
        step: optimiser step.
        epoch: number of the pass over the data; gives fresh masks in every epoch.
        mask_token_id: id of the mask token.
        first_target_position: 1 if the model's logits are shifted: a first token is never a target then.
        keep_token_ids: prompt tokens that stay visible where a prompt is masked, and are never noised.
        rank: this process.
        gather: stacks a tensor of every process along dimension 0; None for a single process.

    Returns:
        Scalar float64, attended tokens of the step over all processes.
    """
    for batch in batches:
        _shorten_rows(batch, args, epoch, first_target_position)
        _choose_prompts(batch, args, epoch, first_target_position, keep_token_ids)
    counts = _count(batches, args, gather)
    rows = counts[:, :, _ROWS].long().T.cpu()  # (microbatches, processes)
    first_slots = (rows.flatten().cumsum(0) - rows.flatten()).view_as(rows)[:, rank].tolist()
    num_slots, num_items = int(rows.sum()), _denominators(counts)
    schedule = noise_schedule(args)
    share = right_context_share(step, args.attention_annealing_steps or 0)
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
        hidden = prompt_mask(batch) & batch["prompt_hidden"][:, None]
        noisy_input_ids = mask_prompt(batch["noisy"].noisy_input_ids, hidden, mask_token_id, keep_token_ids)
        batch["noisy"].noisy_input_ids = noisy_input_ids
        weights = token_weights(
            batch["noisy"],
            target_mask,
            attention_mask,
            args.loss_weighting,
            geometric_p=args.cart_geometric_p or DEFAULT_CART_P,
        )
        if share < 1:
            batch["right_context"] = RightContext(share, args.noise_seed, step)
        batch["row_items"] = num_items[is_unpaired(batch).long()]
        batch["loss_weights"] = loss_weights(weights, target_mask, args.loss_normalization, batch["row_items"]).float()
    return counts[:, :, _TOKENS].sum()


def _count(batches: list[dict[str, Any]], args: DiffusionConfig, gather: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(processes, microbatches, 5) float64: rows, items of the denominator, attended tokens; rows, items unpaired."""
    counts = []
    for batch in batches:
        unpaired = is_unpaired(batch)
        items = count_items(batch["target_mask"], args.loss_normalization)
        unpaired_items = count_items(batch["target_mask"] & unpaired[:, None], args.loss_normalization)
        tokens = batch["attention_mask"].sum()
        num_rows = items.new_tensor(len(unpaired))
        counts.append(torch.stack([num_rows, items, tokens, unpaired.sum(), unpaired_items]))
    local = torch.stack(counts)[None]
    return local if gather is None else gather(local)


def _denominators(counts: Tensor) -> Tensor:
    """(2,) denominators of paired and of unpaired rows: the items of the part over its share of the rows."""
    totals = counts.sum(dim=(0, 1))
    unpaired = totals[[_UNPAIRED_ROWS, _UNPAIRED_ITEMS]]
    rows, items = torch.stack([totals[[_ROWS, _ITEMS]] - unpaired, unpaired], dim=1)
    return items * totals[_ROWS] / rows.clamp(min=1)


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
    num_context = prompt_mask(batch).sum(dim=1)
    lengths = attention_mask.sum(dim=1)
    cut = random_lengths(args.noise_seed, epoch, batch["row_index"], lengths, args.random_length_probability)
    cut = torch.where(num_context <= first_target_position, cut, lengths)
    is_kept = attention_mask.cumsum(dim=1) <= cut[:, None]
    batch["attention_mask"] = attention_mask * is_kept
    batch["target_mask"] = batch["target_mask"] & is_kept


def _choose_prompts(
    batch: dict[str, Any],
    args: DiffusionConfig,
    epoch: int,
    first_target_position: int,
    keep_token_ids: Collection[int],
) -> None:
    """Decide whose prompt is hidden (`prompt_hidden`) and whose becomes part of the targets."""
    row_index, hidden = batch["row_index"], is_unpaired(batch)
    if args.prompt_dropout:
        draw = counter_uniform(args.noise_seed, NoiseStream.PROMPT_DROPOUT, epoch, row_index)
        hidden = hidden | (draw < args.prompt_dropout)
    batch["prompt_hidden"] = hidden
    if args.prompt_noising:
        draw = counter_uniform(args.noise_seed, NoiseStream.PROMPT_NOISING, epoch, row_index)
        noised = (draw < args.prompt_noising) & ~hidden
        kept = torch.tensor(sorted(keep_token_ids), dtype=torch.long, device=row_index.device)
        attended = batch["attention_mask"]
        can_be_noised = attended.bool() & (attended.cumsum(dim=1) > first_target_position)
        can_be_noised &= ~torch.isin(batch["input_ids"], kept)
        batch["target_mask"] = batch["target_mask"] | (can_be_noised & noised[:, None])
