"""`dlm-tune VERB --help`: the keys that matter most, in groups; `--help-all`: every key."""

import inspect
import re
import textwrap
from dataclasses import MISSING, fields

from dlm_tune.commands.arguments import VERBS, verb_classes
from dlm_tune.recipe import Key, keys_of
from dlm_tune.recipe_types import describe

_MODEL = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit")
_LORA = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora")
_DATA = (
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "eval_dataset_name",
    "test_split_size",
    "datasets",
    "dataset_text_field",
    "max_length",
    "packing",
    "overlong_rows",
    "invalid_rows",
    "completion_only_loss",
)
_OBJECTIVE = (
    "noise_schedule",
    "masking",
    "timestep_sampling",
    "noise_epsilon",
    "loss_weighting",
    "loss_normalization",
    "eos_policy",
    "block_length",
    "noise_seed",
    "eval_noise_samples",
)
_OPTIMISATION = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "seed",
)
_RUN = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "evaluate_before",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "use_cpu",
)
_SAMPLER = (
    "max_new_tokens",
    "steps",
    "block_length",
    "temperature",
    "remasking",
    "seed",
    "stop_at_eos",
)
_TRAINING = {
    "Model": _MODEL,
    "Adapter": _LORA,
    "Data": _DATA,
    "Diffusion objective": _OBJECTIVE,
    "Optimisation": _OPTIMISATION,
    "Run, evaluation, checkpoints": _RUN,
}
_CHECKPOINT = (*_MODEL[:1], "adapter", *_MODEL[1:], "use_cpu")

# The groups of `--help`, per verb; every key must be one of the verb's.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "pretrain": _TRAINING,
    "sft": _TRAINING,
    "generate": {
        "Prompts and answers": ("prompt", "prompts_file", "output_file", "chat_template", "batch_size"),
        "Model": _CHECKPOINT,
        "Sampler": _SAMPLER,
    },
    "chat": {"Model": _CHECKPOINT, "Sampler": _SAMPLER},
    "eval": {
        "What is measured": (
            "generate",
            "generation",
            "num_prompts",
            "tasks",
            "tasks_path",
            "tasks_limit",
            "tasks_num_fewshot",
            "tasks_chat_template",
            "output_file",
        ),
        "Model": (*_MODEL[:1], "adapter", *_MODEL[1:]),
        "Data": _DATA,
        "Held-out likelihood": ("eval_noise_samples", "noise_seed", "per_device_eval_batch_size", "bf16", "use_cpu"),
    },
    "inspect": {
        "What is shown": ("estimate", "rows", "token_weights", "color"),
        "Model": _MODEL,
        "Data": _DATA,
        "Diffusion objective": _OBJECTIVE,
        "Batch": ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "use_cpu"),
    },
    "merge": {
        "What and where to": ("adapter", "model_name_or_path", "model_revision", "output_dir", "overwrite"),
        "Weights": ("dtype", "layout", "base_quantization", "max_shard_size"),
    },
    "push": {
        "What and where to": ("model_name_or_path", "hub_model_id", "revision", "private", "overwrite", "dry_run"),
        "The card": ("base_model", "license", "commit_message"),
    },
    "convert": {
        "What and where to": ("model_name_or_path", "model_revision", "output_dir", "overwrite"),
        "Mask token": ("mask_token", "mask_embedding"),
        "Model": ("logits_shift", "dtype", "max_shard_size"),
        "Checkpoints of SMDM": ("source", "tokenizer_name_or_path", "architecture", "num_heads"),
    },
    "report": {},
    "env": {},
}
# Verbs without keys
_USAGES = {"report": "OUTPUT_DIR [OUTPUT_DIR ...] [--output FILE.html]", "env": "[--json]"}
_NOTES = {
    "report": "Writes report.html and report.png into the run's folder, also while it goes on. Several runs are\n"
    "drawn into the same plots, and --output says where. Needs neither network nor GPU, and shows no secrets.",
    "eval": "Takes the recipe of a training run as it is.",
    "inspect": "Takes the recipe of a training run as it is.",
}

# Inherited keys whose own text does not hold here
_TEXTS = {
    "model_name_or_path": "Checkpoint: a folder or a Hub name (for eval, an adapter's folder too).",
    "load_in_4bit": "Quantise the weights to 4 bits (bitsandbytes); in training with use_peft: true only.",
    "load_in_8bit": "Quantise the weights to 8 bits (bitsandbytes); in training with use_peft: true only.",
    "attn_implementation": "sdpa, eager, flash_attention_2, ...",
    "use_peft": "Train a LoRA adapter instead of all weights.",
    "lora_r": "Rank of the adapter.",
    "lora_target_modules": "Names of the layers to adapt; null is all linear layers but the LM head.",
    "max_length": "Longest row in tokens, prompt and EOS included; overlong_rows says what happens to longer ones.",
    "packing": "Put several rows into a sequence of max_length; they do not see each other, and none is cut.",
    "eval_packing": "The same for evaluation; null is as packing.",
    "packing_strategy": "Must stay bfd: rows are packed whole.",
    "padding_free": "Must stay false: use packing.",
    "completion_only_loss": "false: prompts are targets too. null is true for rows with prompt and completion.",
    "max_steps": "Number of training steps, instead of num_train_epochs; -1: train for num_train_epochs.",
    "output_dir": "Folder for the weights, the tokenizer, recipe.yaml, results.json and the checkpoint-* folders.",
    "resume_from_checkpoint": "Go on from a checkpoint-* folder: its path, or last for the newest in output_dir.",
    "seed": "Key of everything random but the noise (noise_seed): order of rows, dropout, new weights, held-out rows.",
    "use_cpu": "Stay on the CPU where there is a GPU.",
}


def verb_help(verb: str, show_all: bool = False) -> str:
    """Text of `dlm-tune VERB --help` or `--help-all`."""
    keys = keys_of(verb_classes(verb))
    lines = [f"dlm-tune {verb}: {VERBS[verb].summary}", ""]
    lines += [f"usage: dlm-tune {verb} " + _USAGES.get(verb, "[--config RECIPE] [--key value ...]")]
    if VERBS[verb].example:
        lines += [f"example: dlm-tune {verb} {VERBS[verb].example}"]
    if verb in _NOTES:
        lines += ["", _NOTES[verb]]
    shown: set[str] = set()
    for title, names in GROUPS[verb].items():
        lines += ["", f"{title}:", *(line for name in names for line in _entry(keys[name]))]
        shown.update(names)
    rest = [key for name, key in keys.items() if name not in shown]
    if show_all:
        for owner in dict.fromkeys(key.owner for key in rest):
            own = [key for key in rest if key.owner is owner]
            lines += ["", f"{owner.__name__}, all other keys:", *(line for key in own for line in _entry(key))]
    elif rest:
        lines += ["", f"{len(rest)} more keys: dlm-tune {verb} --help-all"]
    if verb in ("pretrain", "sft", "eval"):
        lines += ["", "Several processes: --accelerate_config NAME_OR_FILE [--num_processes N]"]
    return "\n".join(lines)


def _entry(key: Key) -> list[str]:
    default = key.default
    kind = "one of " + ", ".join(map(str, key.choices)) if key.choices else describe(key.hint)
    kind = kind if len(kind) < 90 else kind[:87] + "..."
    facts = kind if default in (MISSING, None, "", []) else f"{kind}; default {_shown(default)}"
    text = str(key.definition.metadata.get("help", ""))
    definer = next(owner for owner in key.owner.__mro__ if key.name in inspect.get_annotations(owner))
    if not definer.__module__.startswith("dlm_tune"):
        text = _TEXTS.get(key.name, text)
    text = re.sub(r"\s+", " ", text).replace("%%", "%").replace("`", "")
    body = textwrap.wrap(text, 84) or [""]
    head = f"  --{key.name} ({facts})"
    return [head, *(f"      {line}" for line in body if line)]


def _shown(default: object) -> str:
    value = getattr(default, "value", default)
    return str(value).lower() if isinstance(value, bool) else str(value)


def missing_help_keys(verb: str) -> list[str]:
    """Keys named in the groups that the verb does not have (a test keeps this empty)."""
    known = {definition.name for owner in verb_classes(verb) for definition in fields(owner)}
    return [name for names in GROUPS[verb].values() for name in names if name not in known]
