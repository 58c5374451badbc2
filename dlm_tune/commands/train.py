"""`dlm-tune pretrain` and `dlm-tune sft`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig

from dlm_tune import __version__
from dlm_tune.commands.adapter import adapter_config, check_earlier_adapter, earlier_adapter
from dlm_tune.commands.checkpoint import load_checkpoint
from dlm_tune.commands.console import say
from dlm_tune.commands.inspect_batch import base_config
from dlm_tune.commands.launch import check_parallelism, check_processes
from dlm_tune.data import find_format, load_datasets, load_unpaired
from dlm_tune.hub.card import hub_datasets
from dlm_tune.models import load_tokenizer
from dlm_tune.recipe import Recipe, RecipeError
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from dlm_tune.trainers.checks import check_arguments, check_prompts
from dlm_tune.trainers.saving import INCOMPLETE_FOLDER
from dlm_tune.trainers.unpaired import set_guidance_keep_tokens

# What tells a checkpoint-* folder of a run, whole or not, from a folder of another program
_CHECKPOINT_FILES = (TRAINER_STATE_NAME, "training_args.bin", "model.safetensors", "adapter_model.safetensors")
# State of the optimiser as Trainer, FSDP and DeepSpeed write it
_OPTIMIZER_FILES = ("optimizer*", "global_step*")

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
    adapter = earlier_adapter(model_arguments)
    if adapter is not None:
        check_earlier_adapter(recipe, adapter)
        model_arguments.use_peft = True
    checkpoint = prepare_output_dir(config, run_arguments.overwrite_output_dir, model_arguments.use_peft)
    trainer = build_trainer(verb, recipe, model_arguments, data_arguments, config)
    check_parallelism(trainer.accelerator.distributed_type.value)
    before = None
    if trainer.eval_dataset is not None and run_arguments.evaluate_before and checkpoint is None:
        say("Evaluating before training")
        before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # pushed below, with the results
    trainer.save_state()
    after = trainer.evaluate() if trainer.eval_dataset is not None else None
    if trainer.is_world_process_zero():
        _write_results(trainer, verb, recipe, before, after)
        report = trainer.push_saved() if config.push_to_hub else None
        _print_summary(trainer, before, after, model_arguments)
        if report is not None:
            say(f"Pushed to {report.url}")
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
    if eval_dataset is None and config.eval_packing is not None:
        raise RecipeError(
            [
                f"eval_packing = {config.eval_packing} has no effect without evaluation data. Remove it, or set "
                "eval_dataset_name."
            ],
            recipe.title,
        )
    unpaired_dataset = load_unpaired(data_arguments, text_field=config.dataset_text_field)
    check_guidance_data(model_arguments, config, train_dataset, eval_dataset, unpaired_dataset)
    is_quantised = model_arguments.load_in_4bit or model_arguments.load_in_8bit
    # bitsandbytes places weights while loading: each process on its own device
    device_map = {"": config.device} if is_quantised and not config.use_cpu else None
    model, tokenizer = load_checkpoint(model_arguments, device_map=device_map, is_trainable=True)
    return DiffusionTrainer(
        model=model,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        unpaired_dataset=unpaired_dataset,
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else adapter_config(model_arguments),
    )


def check_guidance_data(
    model_arguments: ModelConfig,
    config: DiffusionConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    unpaired_dataset: Dataset | None,
) -> None:
    """Check before any weight is loaded what the trainer would refuse of guidance afterwards.

    Raises:
        ValueError: unpaired rows, or keys that hide prompts, that do not fit the data; kept tokens that do not exist.
    """
    check_arguments(config, train_dataset, eval_dataset, unpaired_dataset, {})
    first_row: dict[str, Any] = next(iter(train_dataset), {})
    if first_row and all(first_row.values()):  # null and empty columns are faults of their own
        check_prompts(first_row, config, has_unpaired=unpaired_dataset is not None)
    if config.guidance_keep_tokens is not None:
        directory, checkpoint_config = base_config(model_arguments)
        tokenizer = load_tokenizer(directory, model_config=checkpoint_config)
        set_guidance_keep_tokens(checkpoint_config, config, tokenizer)


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
            f"the training data have the columns {listed}: prompts with answers are for `dlm-tune sft`. For "
            "`dlm-tune pretrain` give plain text, or set completion_only_loss: false to train on prompts as well."
        )
    if verb == "sft" and is_text:
        raise ValueError(
            f"the training data have the columns {listed}: nothing tells prompts from answers. Use "
            "`dlm-tune pretrain` for plain text, or give prompt + completion, messages, or input_ids + labels."
        )


def prepare_output_dir(config: DiffusionConfig, overwrite: bool, is_adapter: bool) -> str | None:
    """Check `output_dir` on the first process, and find the checkpoint to resume from.

    Returns:
        The checkpoint's folder, or None for a fresh start.

    Raises:
        ValueError: `output_dir` is not empty, or holds weights of the other kind (adapter or full model), beside
            which the new ones would be ambiguous; nothing to resume from.
    """
    folder = Path(config.output_dir)
    if config.resume_from_checkpoint:
        return _find_checkpoint(folder, config.resume_from_checkpoint)
    if os.environ.get("RANK", "0") != "0" or not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file. Choose another folder.")
    if any(entry.name != INCOMPLETE_FOLDER for entry in folder.iterdir()) and not overwrite:
        raise ValueError(
            f"output_dir={folder} exists and is not empty. Choose another --output_dir, go on with "
            "--resume_from_checkpoint last, or add --overwrite_output_dir."
        )
    other = "config.json" if is_adapter else "adapter_config.json"
    if (folder / other).is_file():
        kinds = ("a full model", "an adapter") if is_adapter else ("an adapter", "a full model")
        raise ValueError(
            f"output_dir={folder} holds {kinds[0]} ({other}), and this run saves {kinds[1]}: which of the two is "
            "loaded later would be unclear. Choose another --output_dir."
        )
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if any((checkpoint / name).is_file() for name in _CHECKPOINT_FILES):
            shutil.rmtree(checkpoint)
    return None


def _find_checkpoint(folder: Path, value: str) -> str:
    """`last` (or `true`) is the newest whole checkpoint in the folder; anything else is a path."""
    if value.lower() in ("last", "latest", "true"):
        found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
        found.sort(key=lambda path: int(path.name.split("-")[-1]))
        whole = [path for path in found if (path / TRAINER_STATE_NAME).is_file()]  # the file that is written last
        if not whole:
            raise ValueError(
                f"resume_from_checkpoint={value}: there is no checkpoint-* folder in output_dir={folder} that was "
                "written to its end. Remove it to start from the beginning; checkpoints are written with "
                "save_strategy: steps."
            )
        if whole[-1] != found[-1]:
            say(f"{found[-1]} was not written to its end: going on from {whole[-1]}.")
        value = str(whole[-1])
    if not (Path(value) / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint={value} is not a checkpoint of a training run (it has no {TRAINER_STATE_NAME}). "
            "Give OUTPUT_DIR/checkpoint-N, or `last`."
        )
    if not any(next(Path(value).glob(pattern), None) for pattern in _OPTIMIZER_FILES):
        raise ValueError(
            f"resume_from_checkpoint={value} has no state of the optimiser (a finished run, or save_only_model: "
            "true), so training cannot go on as it was. Give OUTPUT_DIR/checkpoint-N, or `last`."
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
        "hub_datasets": hub_datasets(recipe),
        "torch": torch.__version__,
        "dlm_tune": __version__,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    trainer.create_model_card()  # once more, with these figures


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
    # the default canvas leaves no room for a prompt in a small model
    positions = getattr(trainer.accelerator.unwrap_model(trainer.model).config, "max_position_embeddings", None)
    canvas = positions // 64 * 32 if positions and 64 <= positions <= 192 else None
    bits = next((f" --{name} true" for name in ("load_in_4bit", "load_in_8bit") if getattr(model_arguments, name)), "")
    data = "" if after is not None else " --eval_dataset_name FILE"
    say(
        "",
        f"The {kind} lies in {folder}, with its tokenizer and recipe.yaml. Next:",
        f"  dlm-tune generate --model_name_or_path {folder}{bits} --prompt 'TEXT'"
        + (f" --max_new_tokens {canvas}" if canvas else ""),
        f"  dlm-tune eval --config {folder}/recipe.yaml --model_name_or_path {folder}{data}",
    )
