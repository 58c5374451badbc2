"""`dlm-tune inspect`: one real batch as the loss sees it."""

import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig

from dlm_tune.commands.checkpoint import find_base
from dlm_tune.commands.console import say
from dlm_tune.commands.dry_run import leave_nothing_behind
from dlm_tune.data import load_datasets
from dlm_tune.models import LLaDAConfig, LLaDAModelLM, load_tokenizer
from dlm_tune.models.checkpoint_files import checkpoint_directory
from dlm_tune.models.loading import load_config
from dlm_tune.recipe import Recipe
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer

# kind of token -> (before, after, ANSI colour, meaning)
MARKERS = {
    "prompt": ("", "", "2", "prompt or other context: seen by the model, never masked, not in the loss"),
    "target": ("{", "}", "32", "target that this noise leaves visible"),
    "masked": ("[", "]", "1;33", "masked target: the model sees the mask token and is scored here"),
    "eos": ("{", "}", "35", "end-of-sequence token as a visible target, written EOS (EOSx3: three of them)"),
    "masked_eos": ("[", "]", "1;35", "masked end-of-sequence token, written EOS"),
    "padding": ("", "", "90", "padding, written PAD: neither seen nor in the loss"),
}


def run_inspect(recipe: Recipe) -> None:
    """Print rows of the first batch of a training run: tokens by kind, t, weight and denominator of each row."""
    with tempfile.TemporaryDirectory() as folder:
        leave_nothing_behind(recipe, folder, place="dlm-tune inspect")
        arguments, _, model_arguments, data_arguments, config = recipe.build()
        trainer = data_only_trainer(model_arguments, data_arguments, config)
        batches, _ = trainer.get_batch_samples(
            iter(trainer.get_train_dataloader()), config.gradient_accumulation_steps, config.device
        )
    use_color = arguments.color == "always" or (
        arguments.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    say(*render_legend(use_color), "", *render_batch(batches, trainer, arguments.rows, use_color))


def data_only_trainer(model_arguments: ModelConfig, data_arguments: Any, config: DiffusionConfig) -> DiffusionTrainer:
    """The trainer of a recipe around a stand-in model: batches and noise depend on the tokenizer and the config only.

    So an 8B recipe is inspected in seconds, on any machine.
    """
    if not model_arguments.model_name_or_path:
        raise ValueError("model_name_or_path is missing: a folder or a Hub name, such as GSAI-ML/LLaDA-8B-Base.")
    path, _ = find_base(model_arguments.model_name_or_path, None)
    checkpoint_config, _ = load_config(checkpoint_directory(path, model_arguments.model_revision))
    tokenizer = load_tokenizer(path, revision=model_arguments.model_revision, model_config=checkpoint_config)
    train_dataset, _ = load_datasets(data_arguments, config.seed, text_field=config.dataset_text_field)
    return DiffusionTrainer(
        model=_stand_in(checkpoint_config, tokenizer),
        args=config,
        train_dataset=train_dataset,
        processing_class=tokenizer,
    )


def _stand_in(checkpoint_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> LLaDAModelLM:
    config = LLaDAConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LLaDAModelLM(config)
    model.config.logits_shift = getattr(checkpoint_config, "logits_shift", False)
    return model


def render_legend(use_color: bool) -> list[str]:
    """One line per kind of token; markers alone tell them apart."""
    lines = ["How to read the rows:"]
    for kind, (_, _, _, meaning) in MARKERS.items():
        sample = {"padding": "PADx2", "eos": "EOS", "masked_eos": "EOS"}.get(kind, "text")
        lines.append(f"  {_mark(kind, sample, use_color)}{' ' * (8 - len(_mark(kind, sample, False)))} {meaning}")
    return lines


def render_batch(
    batches: list[dict[str, Any]], trainer: DiffusionTrainer, num_rows: int, use_color: bool
) -> Iterator[str]:
    """Lines for the first rows of the first microbatches of a step, as `corrupt_batches` left them."""
    config = trainer.args
    rows = sum(len(batch["input_ids"]) for batch in batches)
    yield (
        f"step 0: {rows} rows in {len(batches)} microbatch{'es' if len(batches) > 1 else ''} of this process, "
        f"masking {config.masking}, schedule {config.noise_schedule}, loss per {config.loss_normalization[:-1]}"
    )
    shown = [(batch, row) for batch in batches for row in range(len(batch["input_ids"]))][:num_rows]
    for batch, row in shown:
        yield from ("", *render_row(batch, row, trainer.processing_class, use_color))
    if rows > len(shown):
        yield from ("", f"{rows - len(shown)} more rows: --rows {rows}")


def render_row(
    batch: dict[str, Any], row: int, tokenizer: PreTrainedTokenizerBase, use_color: bool
) -> tuple[str, str]:
    """Figures and tokens of one row.

    The row's loss is `weight / denominator` times the summed negative log-likelihood of its masked tokens, in nats.
    """
    noisy = batch["noisy"]
    weight, coefficient = float(noisy.weights[row]), float(batch["loss_weights"][row])
    denominator = f"{weight / coefficient:.6g}" if coefficient else "none (no target)"
    figures = (
        f"row {int(batch['row_index'][row])}: t {float(noisy.timesteps[row]):.3f}, weight {weight:.4g}, denominator "
        f"{denominator}, {int(noisy.masked[row].sum())} of {int(batch['target_mask'][row].sum())} targets masked, "
        f"{int(batch['attention_mask'][row].sum())} tokens"
    )
    ids = batch["input_ids"][row].tolist()
    kinds = [_kind(batch, row, position, ids[position] == tokenizer.eos_token_id) for position in range(len(ids))]
    pieces = []
    for kind, group in groupby(range(len(ids)), key=kinds.__getitem__):
        positions = list(group)
        if kind in ("padding", "eos", "masked_eos"):
            text = ("PAD" if kind == "padding" else "EOS") + (f"x{len(positions)}" if len(positions) > 1 else "")
        else:
            text = tokenizer.decode([ids[position] for position in positions], clean_up_tokenization_spaces=False)
        pieces.append(_mark(kind, text, use_color))
    return figures, "  " + "".join(pieces).replace("\n", "\\n")


def _kind(batch: dict[str, Any], row: int, position: int, is_eos: bool) -> str:
    if not batch["attention_mask"][row, position]:
        return "padding"
    if not batch["target_mask"][row, position]:
        return "prompt"
    masked = bool(batch["noisy"].masked[row, position])
    return ("masked_eos" if masked else "eos") if is_eos else ("masked" if masked else "target")


def _mark(kind: str, text: str, use_color: bool) -> str:
    before, after, color, _ = MARKERS[kind]
    marked = f"{before}{text}{after}"
    return f"\033[{color}m{marked}\033[0m" if use_color else marked
