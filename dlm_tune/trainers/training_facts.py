"""What a training was, kept as `training.json` beside the weights: the model card is made from it."""

from importlib.metadata import version
from typing import Any

import torch

from dlm_tune import __version__
from dlm_tune.models.checkpoint_files import base_record
from dlm_tune.trainers.diffusion_config import DiffusionConfig

TRAINING_FACTS_NAME = "training.json"

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
# Written where they have a value; the names are those of the recipe.
_SETTINGS = (
    "noise_schedule",
    "noise_schedule_power",
    "masking",
    "noise_epsilon",
    "timestep_sampling",
    "loss_weighting",
    "cart_geometric_p",
    "loss_normalization",
    "random_length_probability",
    "prompt_dropout",
    "prompt_noising",
    "unpaired_fraction",
    "guidance_keep_tokens",
    "guidance_distillation_scale",
    "attention_annealing_steps",
    "max_length",
    "packing",
    "learning_rate",
    "bf16",
    "fp16",
    "seed",
    "noise_seed",
    "eval_noise_samples",
)


def training_facts(trainer: Any) -> dict[str, Any]:
    """Facts of a `DiffusionTrainer` at this step, as JSON values: none of them is a path or a secret.

    Returns:
        `base_model` (a Hub name, or the last part of a local path) and whether it `base_model_is_local`, `settings`,
        `steps`, `epochs`, `tokens` (all of the batches, padding left out), `hardware`, `versions`, and the
        `evaluation` where there was one at this very step.
    """
    args: DiffusionConfig = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    settings = {name: value for name in _SETTINGS if _says_something(name, value := getattr(args, name, None))}
    collator = trainer.data_collator
    settings |= {
        name: value for name in ("eos_policy", "block_length") if (value := getattr(collator, name, None)) is not None
    }
    settings["sequences_per_step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens = trainer._num_tokens
    facts = {
        **base_record(getattr(model.config, "_name_or_path", "") or ""),
        "settings": settings,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "tokens": None if tokens is None else int(tokens.item()),
        "hardware": _hardware(args),
        "versions": {"dlm_tune": __version__, **{name: version(name) for name in _PACKAGES}},
        "evaluation": _evaluation(trainer.state),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _says_something(name: str, value: Any) -> bool:
    return value is not None and value is not False and (value != 0 or name.endswith("seed"))


def _hardware(args: DiffusionConfig) -> str:
    device = args.device
    if device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"CPU, processes: {args.world_size}, threads of each: {torch.get_num_threads()}"
    return f"{args.world_size} x {device.type}"


def _evaluation(state: Any) -> dict[str, float] | None:
    """Metrics of an evaluation of these very weights."""
    found = [entry for entry in state.log_history if "eval_nelbo" in entry and entry["step"] == state.global_step]
    return {name: value for name, value in found[-1].items() if name.startswith("eval_")} if found else None
