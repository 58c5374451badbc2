"""`dlm-tune inspect`: one real batch as the loss sees it."""

import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig

from dlm_tune.commands.checkpoint import base_revision, find_base
from dlm_tune.commands.console import say
from dlm_tune.commands.dry_run import leave_nothing_behind
from dlm_tune.data import load_datasets, load_unpaired
from dlm_tune.models import DreamConfig, LLaDAConfig, guidance_keep_token_ids, load_tokenizer
from dlm_tune.models.checkpoint_files import checkpoint_directory
from dlm_tune.models.loading import load_config, model_class
from dlm_tune.recipe import Recipe
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from dlm_tune.trainers.statistics import BUCKET_NAMES, NUM_BUCKETS

# kind of token -> (before, after, ANSI colour, meaning)
MARKERS = {
    "prompt": ("", "", "2", "prompt or other context: seen by the model, never masked, not in the loss"),
    "hidden": (
        "(",
        ")",
        "2;33",
        "prompt that the model does not see (prompt_dropout, unpaired text), not in the loss",
    ),
    "target": ("{", "}", "32", "target that this noise leaves visible"),
    "masked": ("[", "]", "1;33", "masked target: the model sees the mask token and is scored here"),
    "eos": ("{", "}", "35", "end-of-sequence token as a visible target, written EOS (EOSx3: three of them)"),
    "masked_eos": ("[", "]", "1;35", "masked end-of-sequence token, written EOS"),
    "fill": ("{", "}", "36", "end-of-sequence token that fills an answer up after its end (eos_policy), written FILL"),
    "masked_fill": ("[", "]", "1;36", "the same, masked: scored like any target"),
    "cut": ("<", ">", "31", "cut off by random_length_probability: neither seen nor in the loss"),
    "padding": ("", "", "90", "padding, written PAD: neither seen nor in the loss"),
}
# Kinds whose tokens are counted instead of printed
_WORDS = {"eos": "EOS", "masked_eos": "EOS", "fill": "FILL", "masked_fill": "FILL", "padding": "PAD"}


def run_inspect(recipe: Recipe) -> None:
    """Print rows of the first batch of a training run: tokens by kind, t, weight and denominator of each row."""
    with tempfile.TemporaryDirectory() as folder:
        leave_nothing_behind(recipe, folder, place="dlm-tune inspect")
        arguments, _, model_arguments, data_arguments, config = recipe.build()
        if arguments.estimate:
            from dlm_tune.commands.estimate import run_estimate

            run_estimate(model_arguments, data_arguments, config)
            return
        trainer = data_only_trainer(model_arguments, data_arguments, config)
        batches, _ = trainer.get_batch_samples(
            iter(trainer.get_train_dataloader()), config.gradient_accumulation_steps, config.device
        )
    use_color = arguments.color == "always" or (
        arguments.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    lines = render_batch(batches, trainer, arguments.rows, use_color, arguments.token_weights)
    say(*render_legend(use_color, config.guidance_distillation_scale is not None), "", *lines)


def data_only_trainer(model_arguments: ModelConfig, data_arguments: Any, config: DiffusionConfig) -> DiffusionTrainer:
    """The trainer of a recipe around a stand-in model: batches and noise depend on the tokenizer and the config only.

    So an 8B recipe is inspected in seconds, on any machine.
    """
    directory, checkpoint_config = base_config(model_arguments)
    tokenizer = load_tokenizer(directory, model_config=checkpoint_config)
    train_dataset, _ = load_datasets(data_arguments, config.seed, text_field=config.dataset_text_field)
    return DiffusionTrainer(
        model=_stand_in(checkpoint_config, tokenizer),
        args=config,
        train_dataset=train_dataset,
        unpaired_dataset=load_unpaired(data_arguments, text_field=config.dataset_text_field),
        processing_class=tokenizer,
    )


def base_config(model_arguments: ModelConfig) -> tuple[Path, PreTrainedConfig]:
    """Directory and config of a recipe's base checkpoint; of a Hub repository everything but the weights is fetched.

    Raises:
        ValueError: no checkpoint is named, or it is not one of the supported families.
    """
    if not model_arguments.model_name_or_path:
        raise ValueError("model_name_or_path is missing: a folder or a Hub name, such as GSAI-ML/LLaDA-8B-Base.")
    path, _ = find_base(model_arguments.model_name_or_path, None)
    revision = base_revision(model_arguments.model_name_or_path, model_arguments.model_revision)
    directory = checkpoint_directory(path, revision, with_weights=False)
    return directory, load_config(directory)[0]


def _stand_in(checkpoint_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A tiny model of the same kind: trained as a diffusion model from the start, or a causal decoder."""
    config_class = LLaDAConfig if isinstance(checkpoint_config, LLaDAConfig | DreamConfig) else LlamaConfig
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_causal=False,
    )
    model = model_class(config)(config)
    model.config.logits_shift = getattr(checkpoint_config, "logits_shift", False)
    model.config.guidance_keep_token_ids = guidance_keep_token_ids(checkpoint_config)
    return model


def render_legend(use_color: bool, is_distilled: bool = False) -> list[str]:
    """One line per kind of token; markers alone tell them apart."""
    lines = ["How to read the rows:"]
    for kind, (_, _, _, meaning) in MARKERS.items():
        sample = "PADx2" if kind == "padding" else _WORDS.get(kind, "text")
        lines.append(f"  {_mark(kind, sample, use_color)}{' ' * (8 - len(_mark(kind, sample, False)))} {meaning}")
    score = "divergence from the guided initial model" if is_distilled else "negative log-likelihood"
    lines.append(f"The loss of the step: sum over masked tokens of weight / denominator x {score} (nats)")
    return lines


def render_batch(
    batches: list[dict[str, Any]],
    trainer: DiffusionTrainer,
    num_rows: int,
    use_color: bool,
    show_token_weights: bool = False,
) -> Iterator[str]:
    """Lines for the first rows of the first microbatches of a step, as `corrupt_batches` left them."""
    config, tokenizer = trainer.args, trainer.processing_class
    rows = sum(len(batch["input_ids"]) for batch in batches)
    yield (
        f"step 0: {rows} rows in {len(batches)} microbatch{'es' if len(batches) > 1 else ''} of this process, masking "
        f"{config.masking}, schedule {config.noise_schedule}, weighting {config.loss_weighting}, loss per "
        f"{config.loss_normalization[:-1]}"
    )
    yield from _layout(batches)
    shown = 0
    for number, batch in enumerate(batches):
        for row in range(min(len(batch["input_ids"]), num_rows - shown)):
            yield ""
            yield from _sequence_header(batch, row, number if len(batches) > 1 else None)
            denominator = float(batch["row_items"][row])
            if config.loss_normalization == "sequences":
                denominator *= int(batch["target_mask"][row].sum())
            yield from render_row(batch, row, tokenizer, use_color, denominator, show_token_weights)
        shown = min(num_rows, shown + len(batch["input_ids"]))
    if rows > shown:
        yield from ("", f"{rows - shown} more rows: --rows {rows}")
    yield from ("", *render_buckets(batches))


def _layout(batches: list[dict[str, Any]]) -> Iterator[str]:
    """How much of what the model computes is no padding."""
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    shapes = [batch.get("packed_shape", batch["input_ids"].shape) for batch in batches]
    positions = sum(int(shape[0]) * int(shape[1]) for shape in shapes)
    kind = "packed into " if "packed_position" in batches[0] else ""
    sizes = dict.fromkeys(f"{shape[0]} x {shape[1]}" for shape in shapes)  # each once, in order
    yield f"{kind}{', '.join(sizes)} positions: {tokens} of {positions} hold tokens ({tokens / positions:.1%})"


def _sequence_header(batch: dict[str, Any], row: int, microbatch: int | None) -> Iterator[str]:
    """Before the first row of a packed sequence: how full the sequence is."""
    if "packed_position" not in batch:
        return
    length = int(batch["packed_shape"][1])
    # the first token of a row, which is always attended
    sequences = batch["packed_position"][:, 0] // length
    if row and sequences[row] == sequences[row - 1]:
        return
    members = sequences == sequences[row]
    tokens = int(batch["attention_mask"][members].sum())
    where = "" if microbatch is None else f"microbatch {microbatch}, "
    yield (
        f"{where}sequence {int(sequences[row])}: {int(members.sum())} documents, {tokens} of {length} columns "
        f"({tokens / length:.1%})"
    )


def render_row(
    batch: dict[str, Any],
    row: int,
    tokenizer: PreTrainedTokenizerBase,
    use_color: bool,
    denominator: float,
    show_token_weights: bool = False,
) -> Iterator[str]:
    """Figures and tokens of one row.

    The row's loss is the sum over its masked tokens of `weight / denominator` times their negative log-likelihood, in
    nats; where the weights differ inside the row, the smallest, the mean and the largest are given.

    Args:
        batch: with the keys of the collator and of `corrupt_batches`.
        row: in the row view.
        tokenizer: the tokenizer.
        use_color: whether to print ANSI colours.
        denominator: of the step: all its targets; or, with `loss_normalization: sequences`, the targets of the row
            times the rows that have one.
        show_token_weights: also print the weight of each masked token.
    """
    noisy = batch["noisy"]
    masked = noisy.masked[row]
    weights = batch["loss_weights"][row][masked].double() * denominator
    num_targets = int(batch["target_mask"][row].sum())
    figures = [
        f"row {int(batch['row_index'][row])}:",
        *_columns(batch, row),
        f"t {float(noisy.timesteps[row]):.3f},",
        f"weight {_weight_range(weights)}," if len(weights) else "weight 0,",
        f"denominator {denominator:.6g}," if num_targets else "denominator none (no target),",
        f"{len(weights)} of {num_targets} targets masked, {int(batch['attention_mask'][row].sum())} tokens",
    ]
    yield " ".join(figures)
    ids = batch["input_ids"][row].tolist()
    kinds = token_kinds(batch, row, tokenizer)
    pieces = []
    for kind, group in groupby(range(len(ids)), key=kinds.__getitem__):
        positions = list(group)
        if kind == "padding" and "packed_position" in batch:
            continue  # of the row view only: the model does not see it
        if kind in _WORDS:
            text = _WORDS[kind] + (f"x{len(positions)}" if len(positions) > 1 else "")
        else:
            text = tokenizer.decode([ids[position] for position in positions], clean_up_tokenization_spaces=False)
        pieces.append(_mark(kind, text, use_color))
    yield "  " + "".join(pieces).replace("\n", "\\n")
    if show_token_weights and len(weights):
        tokens = [ids[position] for position in masked.nonzero()[:, 0].tolist()]
        texts = [tokenizer.decode([token]).replace("\n", "\\n") for token in tokens]
        shown = [f"[{text}] {weight:.4g}" for text, weight in zip(texts, weights.tolist(), strict=True)]
        yield "  weights: " + ", ".join(shown)


def _columns(batch: dict[str, Any], row: int) -> Iterator[str]:
    if "packed_position" not in batch:
        return
    length = int(batch["packed_shape"][1])
    columns = batch["packed_position"][row][batch["attention_mask"][row].bool()] % length
    yield f"columns {int(columns[0])}-{int(columns[-1])},"


def _weight_range(weights: Tensor) -> str:
    """One weight where all are equal up to float32 rounding, else smallest/mean/largest."""
    smallest, largest = float(weights.min()), float(weights.max())
    if largest - smallest <= 1e-6 * largest:
        return f"{largest:.4g}"
    return f"{smallest:.4g}/{float(weights.mean()):.4g}/{largest:.4g}"


def render_buckets(batches: list[dict[str, Any]]) -> Iterator[str]:
    """Per noise level: rows, masked tokens, and their share of the summed weight of the step's loss."""
    totals = torch.zeros(NUM_BUCKETS, 3, dtype=torch.float64)
    for batch in batches:
        num_masked, num_targets = batch["noisy"].masked.sum(dim=1).cpu(), batch["target_mask"].sum(dim=1).cpu()
        weight = batch["loss_weights"].double().sum(dim=1).cpu()
        has_targets = num_targets > 0
        bucket = noise_bucket(num_masked, num_targets)[has_targets]
        columns = torch.stack([torch.ones_like(weight), num_masked.double(), weight], dim=1)
        totals.index_add_(0, bucket, columns[has_targets])
    total_weight = float(totals[:, 2].sum()) or 1.0
    yield f"{'targets masked':16}{'rows':>6}{'masked tokens':>15}{'share of the weight':>21}"
    for name, (rows, masked, weight) in zip(BUCKET_NAMES, totals.tolist(), strict=True):
        low, high = name.split("_")
        yield f"{int(low):>3}-{int(high)} %{rows:>{15 - len(high)}.0f}{masked:>15.0f}{weight / total_weight:>21.1%}"


def noise_bucket(num_masked: Tensor, num_targets: Tensor) -> Tensor:
    """Noise level of rows as the training log has it: four equal ranges of the masked fraction of the targets."""
    fraction = num_masked.double() / num_targets.double().clamp(min=1)
    return (fraction * NUM_BUCKETS).long().clamp(max=NUM_BUCKETS - 1)


def token_kinds(batch: dict[str, Any], row: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The kind of each position of a row, a key of `MARKERS`."""
    ids = batch["input_ids"][row]
    attended, is_fill = batch["attention_mask"][row].bool(), batch["eos_padding_mask"][row].bool()
    # of a row that was shortened the collated tokens are still there
    content = (attended | is_fill | (ids != tokenizer.pad_token_id)).nonzero()
    end = int(content[-1]) + 1 if len(content) else 0
    start = int(attended.int().argmax())
    is_target, masked = batch["target_mask"][row].tolist(), batch["noisy"].masked[row].tolist()
    noisy_ids = batch["noisy"].noisy_input_ids[row]
    kinds = []
    for position in range(len(ids)):
        if not attended[position]:
            kinds.append("cut" if start < position < end else "padding")
            continue
        kind = "prompt" if noisy_ids[position] == ids[position] else "hidden"
        if is_target[position]:
            is_eos = ids[position] == tokenizer.eos_token_id
            name = "fill" if is_fill[position] else "eos" if is_eos else ""
            kind = "_".join(filter(None, ("masked" if masked[position] else "", name))) or "target"
        kinds.append(kind)
    return kinds


def _mark(kind: str, text: str, use_color: bool) -> str:
    before, after, color, _ = MARKERS[kind]
    marked = f"{before}{text}{after}"
    return f"\033[{color}m{marked}\033[0m" if use_color else marked
