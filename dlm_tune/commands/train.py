"""`dlm-tune pretrain` and `dlm-tune sft`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, get_peft_config

from dlm_tune import __version__
from dlm_tune.commands.checkpoint import load_checkpoint
from dlm_tune.commands.launch import check_parallelism, check_processes
from dlm_tune.commands.run import say
from dlm_tune.data import find_format, load_datasets
from dlm_tune.models import FAMILIES
from dlm_tune.recipe import Recipe, RecipeError
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer

_METRICS = {
    "eval_nelbo": "held-out NELBO, nats/token",
    "eval_nelbo_standard_error": "  standard error",
    "eval_perplexity_bound": "perplexity bound",
    "eval_masked_accuracy": "accuracy at masked tokens",
}


def run_training(verb: str, recipe: Recipe) -> None:
    """Train as a recipe says, and leave weights, tokenizer, `recipe.yaml` and `results.json` in `output_dir`."""
    if not recipe.get("output_dir"):  # trl would fill in a folder of its own
        raise RecipeError(
            ["output_dir is missing: the folder for the weights, for example outputs/my-run."], recipe.title
        )
    run_arguments, model_arguments, data_arguments, config = recipe.build()
    check_processes()
    checkpoint = prepare_output_dir(config, run_arguments.overwrite_output_dir)
    trainer = build_trainer(verb, recipe, model_arguments, data_arguments, config)
    check_parallelism(trainer.accelerator.distributed_type.value)
    before = None
    if trainer.eval_dataset is not None and run_arguments.evaluate_before and checkpoint is None:
        say("Evaluating before training")
        before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    after = trainer.evaluate() if trainer.eval_dataset is not None else None
    if trainer.is_world_process_zero():
        _write_results(trainer, verb, recipe, before, after)
        _print_summary(trainer, before, after, model_arguments)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def build_trainer(
    verb: str, recipe: Recipe, model_arguments: ModelConfig, data_arguments: Any, config: DiffusionConfig
) -> DiffusionTrainer:
    """Load model, tokenizer and data sets, and put the trainer together.

    Raises:
        ValueError: the data do not fit the verb, or there is no data to evaluate on although the recipe asks for it.
    """
    train_dataset, eval_dataset = load_datasets(data_arguments, config.seed, text_field=config.dataset_text_field)
    check_data(verb, train_dataset.column_names, config)
    if eval_dataset is None and config.eval_strategy != "no":
        raise RecipeError(
            [
                f"eval_strategy = {config.eval_strategy} needs evaluation data: set eval_dataset_name, "
                "test_split_size (0.05 or a number of rows) or dataset_test_split, or remove it."
            ],
            recipe.title,
        )
    is_quantised = model_arguments.load_in_4bit or model_arguments.load_in_8bit
    # bitsandbytes places weights while loading: each process on its own device
    device_map = {"": config.device} if is_quantised and not config.use_cpu else None
    model, tokenizer = load_checkpoint(model_arguments, device_map=device_map)
    if isinstance(model, PeftModel):
        raise ValueError(
            f"model_name_or_path={model_arguments.model_name_or_path} is an adapter: training starts from a full "
            "checkpoint. To go on with a run of its own, use --resume_from_checkpoint."
        )
    return DiffusionTrainer(
        model=model,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=adapter_config(model_arguments, model.config.model_type),
    )


def adapter_config(model_arguments: ModelConfig, model_type: str) -> LoraConfig | None:
    """TRL's LoRA configuration; without `lora_target_modules`, on all linear layers of the family but the LM head."""
    config = get_peft_config(model_arguments)
    if config is not None and config.target_modules is None and config.target_parameters is None:
        config.target_modules = set(FAMILIES[model_type].lora_target_modules)
    return config


def check_data(verb: str, column_names: list[str], config: DiffusionConfig) -> None:
    """Check that the data are of the verb's kind: text for `pretrain`, answers to prompts for `sft`.

    Raises:
        ValueError: they are of the other kind.
    """
    columns = find_format(column_names, text_field=config.dataset_text_field, source="the training data")
    is_text = columns == [config.dataset_text_field] or columns == ["input_ids"]
    listed = ", ".join(columns)
    if verb == "pretrain" and not is_text and config.completion_only_loss is not False:
        raise ValueError(
            f"the training data have the columns {listed}: prompts are not learned from in `dlm-tune sft`. For "
            "`dlm-tune pretrain` give plain text, or set completion_only_loss: false to train on prompts as well."
        )
    if verb == "sft" and is_text:
        raise ValueError(
            f"the training data have the columns {listed}: nothing tells prompts from answers. Use "
            "`dlm-tune pretrain` for plain text, or give prompt + completion, messages, or input_ids + labels."
        )


def prepare_output_dir(config: DiffusionConfig, overwrite: bool) -> str | None:
    """Check `output_dir` on the first process, and find the checkpoint to resume from.

    Returns:
        The checkpoint's folder, or None for a fresh start.

    Raises:
        ValueError: `output_dir` is not empty; nothing to resume from.
    """
    folder = Path(config.output_dir)
    if config.resume_from_checkpoint:
        return _find_checkpoint(folder, config.resume_from_checkpoint)
    if os.environ.get("RANK", "0") != "0" or not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file. Choose another folder.")
    if any(folder.iterdir()) and not overwrite:
        raise ValueError(
            f"output_dir={folder} exists and is not empty. Choose another --output_dir, go on with "
            "--resume_from_checkpoint last, or add --overwrite_output_dir."
        )
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / "trainer_state.json").is_file():
            shutil.rmtree(checkpoint)
    return None


def _find_checkpoint(folder: Path, value: str) -> str:
    """`last` (or `true`) is the newest checkpoint in the folder; anything else is a path."""
    if value.lower() in ("last", "latest", "true"):
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is None:
            raise ValueError(
                f"resume_from_checkpoint={value}: there is no checkpoint-* folder in output_dir={folder}. Remove "
                "it to start from the beginning; checkpoints are written with save_strategy: steps."
            )
        return last
    if not (Path(value) / "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint={value} is not a checkpoint of a training run (it has no trainer_state.json). "
            "Give OUTPUT_DIR/checkpoint-N, or `last`."
        )
    return value


def _write_results(
    trainer: DiffusionTrainer,
    verb: str,
    recipe: Recipe,
    before: dict[str, float] | None,
    after: dict[str, float] | None,
) -> None:
    folder = Path(trainer.args.output_dir)
    header = f"The recipe of this run, flags included.\n  dlm-tune {verb} --config recipe.yaml\ndlm-tune {__version__}"
    (folder / "recipe.yaml").write_text(recipe.to_yaml(header), encoding="utf-8")
    results = {
        "before": before,
        "after": after,
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "torch": torch.__version__,
        "dlm_tune": __version__,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _print_summary(
    trainer: DiffusionTrainer,
    before: dict[str, float] | None,
    after: dict[str, float] | None,
    model_arguments: ModelConfig,
) -> None:
    folder = trainer.args.output_dir
    if after is not None:
        say("", f"{'':28}{'before':>12}{'after':>12}")
        for name, label in _METRICS.items():
            values = [metrics.get(name) if metrics else None for metrics in (before, after)]
            cells = "".join(f"{'-' if value is None else format(value, '.4f'):>12}" for value in values)
            say(f"{label:28}{cells}")
    kind = "adapter" if model_arguments.use_peft else "model"
    say(
        "",
        f"The {kind} lies in {folder}, with its tokenizer and recipe.yaml. Next:",
        f"  dlm-tune generate --model_name_or_path {folder} --prompt 'TEXT'",
        f"  dlm-tune eval --config {folder}/recipe.yaml --model_name_or_path {folder}",
    )
