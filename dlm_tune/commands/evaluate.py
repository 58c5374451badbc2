"""`dlm-tune eval`: held-out likelihood, accuracy of completions, benchmark tasks."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset

from dlm_tune.commands.arguments import EvalArguments
from dlm_tune.commands.checkpoint import load_checkpoint
from dlm_tune.commands.console import say
from dlm_tune.commands.dry_run import leave_nothing_behind
from dlm_tune.commands.launch import check_processes
from dlm_tune.data import load_datasets
from dlm_tune.generation import DiffusionGenerationConfig
from dlm_tune.recipe import Recipe, RecipeError, check_mapping
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer

_NUM_SAMPLES = 5


def run_eval(recipe: Recipe) -> None:
    """Print, and write to `output_file`, the figures that were asked for."""
    with tempfile.TemporaryDirectory() as folder:
        overrides: dict[str, Any] = {"gradient_checkpointing": False}
        if not (recipe.get("dataset_name") or recipe.get("datasets")):
            if not recipe.get("eval_dataset_name"):
                fault = "no evaluation data: set eval_dataset_name (a file, a directory or a Hub name)."
                raise RecipeError([fault], recipe.title)
            overrides["dataset_name"] = recipe.get("eval_dataset_name")
        leave_nothing_behind(recipe, folder, place="dlm-tune eval", **overrides)
        arguments, _, model_arguments, data_arguments, config = recipe.build()
        generation = generation_config(arguments, recipe)
        check_processes()
        dataset = _evaluation_data(arguments, data_arguments, config)
        model, tokenizer = load_checkpoint(
            model_arguments, adapter=arguments.adapter, device_map=None if config.use_cpu else {"": config.device}
        )
        # what only training does: the teacher, a second model, annealing, unpaired rows and what is done to prompts
        config.guidance_distillation_scale = config.unpaired_fraction = config.attention_annealing_steps = None
        config.prompt_dropout = config.prompt_noising = 0.0
        # Evaluation needs no training data; the trainer asks for some
        trainer = DiffusionTrainer(
            model=model, args=config, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
        )
        noise = {"noise_seed": config.noise_seed, "eval_noise_samples": config.eval_noise_samples}
        results: dict[str, Any] = {"likelihood": trainer.evaluate() | noise}
        if trainer.is_world_process_zero():
            _print_likelihood(results["likelihood"])
            if arguments.generate:
                results["completions"] = _evaluate_completions(
                    arguments, generation, trainer, dataset, config.per_device_eval_batch_size
                )
            if arguments.tasks:
                results["tasks"] = _evaluate_tasks(arguments, generation, model, tokenizer)
            _write(arguments.output_file, results)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()  # a process that leaves with its group open may abort


def generation_config(arguments: EvalArguments, recipe: Recipe) -> DiffusionGenerationConfig:
    """The sampler options of the key `generation`.

    Raises:
        RecipeError: unknown options, or values that the sampler refuses.
    """
    options, faults = check_mapping(arguments.generation or {}, DiffusionGenerationConfig, "generation")
    if faults:
        raise RecipeError(faults, recipe.title)
    config = DiffusionGenerationConfig(**options)
    config.check_guidance()
    return config


def _evaluation_data(arguments: EvalArguments, data_arguments: Any, config: DiffusionConfig) -> Dataset:
    _, dataset = load_datasets(data_arguments, config.seed, text_field=config.dataset_text_field)
    if dataset is None:
        raise ValueError(
            "there is nothing to evaluate on: dataset_name and datasets are training data. Set eval_dataset_name (a "
            "file, a directory or a Hub name; it may be the training file), dataset_test_split or test_split_size."
        )
    if arguments.generate and not {"prompt", "completion"} <= set(dataset.column_names):
        raise ValueError(
            f"generate: true needs evaluation rows with prompt and completion, not {', '.join(dataset.column_names)}."
        )
    return dataset


def _print_likelihood(metrics: dict[str, float]) -> None:
    say(
        f"held-out NELBO            {metrics['eval_nelbo']:.4f} +- {metrics['eval_nelbo_standard_error']:.4f} "
        "nats/token (upper bound on the negative log-likelihood)",
        f"perplexity bound          {metrics['eval_perplexity_bound']:.3f}",
        f"accuracy at masked tokens {metrics['eval_masked_accuracy']:.4f}",
        f"rows                      {metrics['eval_num_rows']:.0f}",
    )


def _evaluate_completions(
    arguments: EvalArguments,
    generation: DiffusionGenerationConfig,
    trainer: DiffusionTrainer,
    dataset: Dataset,
    batch_size: int,
) -> dict[str, Any]:
    from dlm_tune.evaluation.completions import evaluate_completions

    if arguments.num_prompts is not None:
        dataset = dataset.select(range(min(arguments.num_prompts, len(dataset))))
    model = trainer.accelerator.unwrap_model(trainer.model)
    report = evaluate_completions(model, trainer.processing_class, dataset, generation, batch_size)
    say(
        f"exact match               {report.exact_match:.4f} +- {report.exact_match_standard_error:.4f} "
        f"of {report.num_rows} prompts",
        f"character error rate      {report.error_rate:.4f}",
        f"forward passes            {report.num_forward_passes} of {report.num_row_passes} rows",
        "",
        *(
            f"  {prompt!r} -> {text!r} (expected {expected!r})"
            for prompt, expected, text in report.samples[:_NUM_SAMPLES]
        ),
    )
    return {
        "exact_match": report.exact_match,
        "exact_match_standard_error": report.exact_match_standard_error,
        "error_rate": report.error_rate,
        "num_rows": report.num_rows,
        "num_forward_passes": report.num_forward_passes,
        "num_row_passes": report.num_row_passes,
        "generation": dataclasses.asdict(generation),
        "samples": [
            {"prompt": prompt, "expected": expected, "generated": text} for prompt, expected, text in report.samples
        ],
    }


def _evaluate_tasks(
    arguments: EvalArguments, generation: DiffusionGenerationConfig, model: Any, tokenizer: Any
) -> dict[str, Any]:
    from dlm_tune.evaluation.harness import run_harness

    results = run_harness(
        model,
        tokenizer,
        arguments.tasks or [],
        generation_config=generation if arguments.generation else None,
        include_path=arguments.tasks_path,
        limit=arguments.tasks_limit,
        num_fewshot=arguments.tasks_num_fewshot,
        apply_chat_template=arguments.tasks_chat_template,
    )
    for task, metrics in results.get("results", {}).items():
        figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        say(f"{task:25} {figures}")
    return {name: results[name] for name in ("results", "versions", "n-shot", "n-samples") if name in results}


def _write(output_file: str | None, results: dict[str, Any]) -> None:
    if output_file is None:
        return
    path = Path(output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"Written to {path}")
