"""Keys that are set but would do nothing, or that the command line decides itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dlm_tune.recipe import Key, Recipe


@dataclass(frozen=True)
class Condition:
    """`keys` are read only while `holds(value of controller)`."""

    keys: tuple[str, ...]
    controller: str
    holds: Callable[[Any], bool]
    remedy: str


_LORA = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
    "load_in_4bit",
    "load_in_8bit",
)

CONDITIONS = [
    Condition(_LORA, "use_peft", bool, "use_peft: true"),
    Condition(("load_in_8bit",), "load_in_4bit", lambda value: not value, "load_in_4bit: false"),
    Condition(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
        "load_in_4bit",
        bool,
        "load_in_4bit: true",
    ),
    Condition(("num_train_epochs",), "max_steps", lambda steps: steps <= 0, "max_steps: -1"),
    Condition(("save_steps",), "save_strategy", lambda value: value == "steps", "save_strategy: steps"),
    Condition(
        ("save_total_limit", "save_only_model"), "save_strategy", lambda value: value != "no", "save_strategy: steps"
    ),
    Condition(("eval_steps",), "eval_strategy", lambda value: value == "steps", "eval_strategy: steps"),
    Condition(("eval_delay",), "eval_strategy", lambda value: value != "no", "eval_strategy: steps"),
    Condition(("logging_steps",), "logging_strategy", lambda value: value == "steps", "logging_strategy: steps"),
    Condition(("gradient_checkpointing_kwargs",), "gradient_checkpointing", bool, "gradient_checkpointing: true"),
    Condition(
        ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "push_to_hub",
        bool,
        "push_to_hub: true",
    ),
    Condition(
        ("dataloader_prefetch_factor", "dataloader_persistent_workers"),
        "dataloader_num_workers",
        lambda workers: workers > 0,
        "dataloader_num_workers: 2",
    ),
    Condition(("torch_compile_backend", "torch_compile_mode"), "torch_compile", bool, "torch_compile: true"),
    Condition(("fsdp_config",), "fsdp", bool, "fsdp: full_shard, or better an accelerate configuration"),
    Condition(
        ("unpaired_fraction", "unpaired_dataset_config", "unpaired_dataset_split"),
        "unpaired_dataset",
        bool,
        "unpaired_dataset: FILE",
    ),
    Condition(("rows", "token_weights", "color"), "estimate", lambda value: not value, "estimate: false"),
    Condition(
        ("tokenizer_name_or_path", "architecture", "num_heads"),
        "source",
        lambda source: source == "smdm",
        "source: smdm",
    ),
    Condition(
        ("mask_token", "mask_embedding", "logits_shift", "model_revision"),
        "source",
        lambda source: source == "hf",
        "source: hf",
    ),
    Condition(("generation",), "generate", bool, "generate: true"),
    Condition(("num_prompts",), "generate", bool, "generate: true"),
    Condition(
        ("tasks_path", "tasks_limit", "tasks_num_fewshot", "tasks_chat_template"), "tasks", bool, "tasks: [NAME]"
    ),
]

# Keys that the verb decides itself, with the reason.
DECIDED = {
    "do_train": "the verb says what is done",
    "do_eval": "the verb says what is done; during training, eval_strategy",
    "do_predict": "the verb says what is done; `dlm-tune generate` completes prompts",
    "local_rank": "the launcher sets it",
    "model_init_kwargs": "the model is loaded with model_revision, dtype, attn_implementation and load_in_4bit",
    "lora_task_type": "the adapter always wraps the whole diffusion model",
    "hub_token": "a secret does not belong in a recipe: run `hf auth login` or set HF_TOKEN",
}

# What `eval` and `inspect` read of a training recipe. They take the file whole, but not flags without effect.
_DATA_KEYS = {
    "assistant_only_loss",
    "bf16",
    "block_length",
    "chat_template_path",
    "completion_only_loss",
    "data_seed",
    "dataset_kwargs",
    "dataset_num_proc",
    "dataset_text_field",
    "dataloader_num_workers",
    "eos_policy",
    "eos_token",
    "fp16",
    "invalid_rows",
    "max_length",
    "noise_seed",
    "output_dir",
    "overlong_rows",
    "packing",
    "pad_to_multiple_of",
    "seed",
    "use_cpu",
}
_STEP_KEYS = {
    "cart_geometric_p",
    "gradient_accumulation_steps",
    "loss_normalization",
    "loss_weighting",
    "masking",
    "noise_epsilon",
    "noise_schedule",
    "noise_schedule_power",
    "guidance_distillation_scale",
    "guidance_keep_tokens",
    "prompt_dropout",
    "prompt_noising",
    "unpaired_fraction",
    "per_device_train_batch_size",
    "random_length_probability",
    "shuffle_dataset",
    "timestep_sampling",
    "train_sampling_strategy",
}
_EVAL_KEYS = {"bf16_full_eval", "eval_noise_samples", "eval_packing", "fp16_full_eval", "per_device_eval_batch_size"}
# what `inspect --estimate` reads beside
_ESTIMATE_KEYS = {
    "dataloader_drop_last",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "max_steps",
    "num_train_epochs",
    "optim",
}
_UNPAIRED_KEYS = {"unpaired_dataset", "unpaired_dataset_config", "unpaired_dataset_split"}
_READ_BY = {"eval": _DATA_KEYS | _EVAL_KEYS, "inspect": _DATA_KEYS | _STEP_KEYS}


def ineffective_keys(verb: str, recipe: Recipe, keys: Mapping[str, Key]) -> list[str]:
    """Faults of keys that are written but do nothing in this verb.

    A flag may make a key of the recipe idle (`--max_steps 5` over `num_train_epochs`); the reverse is a fault, and so
    is an idle key within one file or one command line.
    """
    faults = [
        f"{recipe.settings[name].place}: {name} cannot be set: {reason}. Remove it."
        for name, reason in DECIDED.items()
        if name in recipe
    ]
    # `tasks` uses the sampler options as well
    has_tasks = bool(recipe.get("tasks"))
    for condition in CONDITIONS:
        controller = condition.controller
        if controller not in keys or condition.holds(recipe.get(controller, keys[controller].default)):
            continue
        by_flag = controller in recipe and recipe.settings[controller].is_flag
        for name in condition.keys:
            setting = recipe.settings.get(name)
            if setting is None or setting.value is None or setting.value is False or (by_flag and not setting.is_flag):
                continue
            if name == "generation" and has_tasks:
                continue
            value = recipe.get(controller, keys[controller].default)
            shown = str(value).lower() if isinstance(value, bool) else value
            faults.append(
                f"{setting.place}: {name} = {setting.value!r} has no effect with {controller}: {shown}. Remove it, or "
                f"set {condition.remedy}."
            )
    return faults + _flags_not_read(verb, recipe, keys)


def _flags_not_read(verb: str, recipe: Recipe, keys: Mapping[str, Key]) -> list[str]:
    if verb not in _READ_BY:
        return []
    read = _READ_BY[verb] | (_ESTIMATE_KEYS if recipe.get("estimate") else set())
    return [
        f"--{name}: has no effect in `dlm-tune {verb}`, which does not read it. Remove it."
        for name, setting in recipe.settings.items()
        if setting.is_flag
        and (
            (keys[name].owner.__name__ in ("RunArguments", "DiffusionConfig") and name not in read)
            or (verb == "eval" and name in _UNPAIRED_KEYS)
        )
    ]
