"""The sections of a model card; each is "" where nothing is known."""

from typing import Any

from dlm_tune.hub.facts import RECIPE_FILE, CheckpointFacts

_FAMILY_NAMES = {"llada": "LLaDA"}
_CANVAS = 128  # tokens that the example generates, where there is room
_BLOCK = 32
_OBJECTIVES = {
    "nelbo": "bound on the negative log-likelihood (NELBO)",
    "uniform": "cross-entropy of masked tokens, all of one weight",
    "cart": "cross-entropy of masked tokens, weighted by nearby visible tokens (CART)",
}
_TRAINING_ROWS = {
    "masking": "masking",
    "timestep_sampling": "timesteps",
    "noise_epsilon": "smallest timestep",
    "loss_normalization": "loss per",
    "random_length_probability": "rows of random length",
    "max_length": "longest row, tokens",
    "packing": "packing",
    "attention_annealing_steps": "steps from causal to bidirectional attention",
    "learning_rate": "learning rate",
    "sequences_per_step": "sequences per step",
}
_SAMPLER = ("max_new_tokens", "steps", "block_length", "remasking", "temperature", "guidance_scale", "seed")


def usage_section(facts: CheckpointFacts, name: str) -> str:
    """How to load and sample with dlm_tune: code that runs when pasted."""
    names = f"{name} {facts.base_model or ''} {facts.recipe.get('model_name_or_path') or ''}".lower()
    is_chat = "instruct" in names or "chat" in names
    if is_chat:
        prompt = (
            'messages = [{"role": "user", "content": "Say hello in three languages."}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
            ")"
        )
    else:
        prompt = 'inputs = tokenizer(["Your prompt"], return_tensors="pt")'
    options = ", ".join(f"{key}={value!r}" for key, value in _example_sampler(facts).items())
    return f"""## Use

```python
from dlm_tune import generate, load_model, load_tokenizer

model, tokenizer = load_model("{name}"), load_tokenizer("{name}")
{prompt}
output = generate(model, inputs["input_ids"].to(model.device), {options})
print(tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

or `dlm-tune generate --model_name_or_path {name} --prompt "Your prompt"`. Add `device_map="auto"` to `load_model` for
a GPU, `quantization="4bit"` to load the weights in 4 bits."""


def model_section(facts: CheckpointFacts) -> str:
    """The facts of the checkpoint itself."""
    config, known = facts.config, facts.family_facts
    token = f"`{facts.mask_token}`, id {facts.mask_token_id}" if facts.mask_token else f"id {facts.mask_token_id}"
    rows = {
        "family": _FAMILY_NAMES.get(facts.model_type or "", facts.model_type),
        "mask token": token,
        "logits shift": _shift(facts.logits_shift),
        "attention": "bidirectional",
        "tokens that unconditional guidance sees": known.get("guidance_keep_token_ids"),
        "guidance is distilled into the weights, scale": known.get("guidance_distillation_scale"),
    }
    if (merged := facts.training.get("merged_adapter")) and not facts.is_adapter:
        parts = (merged.get("peft_type"), f"rank {merged['r']}" if merged.get("r") else None)
        rows["weights"] = f"base and adapter, merged ({', '.join(part for part in parts if part)})"
    if facts.is_adapter:
        modules = config.get("target_modules")
        rows |= {
            "adapter": config.get("peft_type"),
            "rank, alpha": f"{config['r']}, {config.get('lora_alpha')}" if "r" in config else None,
            "adapted layers": ", ".join(sorted(modules)) if isinstance(modules, list) else modules,
            "trained whole": ", ".join(config.get("modules_to_save") or []),
        }
    return _table("The checkpoint", rows)


def evaluation_section(facts: CheckpointFacts) -> str:
    """Held-out figures, with what they were measured with."""
    before, after = facts.results.get("before") or {}, facts.results.get("after") or facts.training.get("evaluation")
    completions, likelihood = (facts.evaluation.get(part) or {} for part in ("completions", "likelihood"))
    settings, after = facts.settings | likelihood, after or likelihood
    rows: dict[str, Any] = {}
    if "eval_nelbo" in after:
        rows["held-out NELBO, nats per token"] = _figure(after, "eval_nelbo")
        rows["the same before training"] = _figure(before, "eval_nelbo") if "eval_nelbo" in before else None
        rows["rows"] = _count(after.get("eval_num_rows"))
        rows["noise seed"] = settings.get("noise_seed")
        rows["noise samples per row"] = settings.get("eval_noise_samples")
    if "exact_match" in completions:
        sampler = completions.get("generation") or {}
        rows["exact match"] = _figure(completions, "exact_match")
        rows["character error rate"] = f"{completions['error_rate']:.4f}"
        rows["prompts completed"] = _count(completions.get("num_rows"))
        rows["sampler"] = ", ".join(f"{key} {sampler[key]}" for key in _SAMPLER if key in sampler)
    note = "The NELBO is an upper bound on the negative log-likelihood; ± is one standard error over rows."
    return f"{table}\n\n{note}" if (table := _table("Evaluation", rows)) else ""


def training_section(facts: CheckpointFacts) -> str:
    """How it was trained."""
    settings, training = facts.settings, facts.training
    schedule = settings.get("noise_schedule")
    if schedule == "polynomial":
        schedule = f"polynomial, alpha(t) = 1 - t^{settings.get('noise_schedule_power', 1.25)}"
    eos = settings.get("eos_policy")
    if eos == "pad_to_block":
        eos = f"pad_to_block: answers are filled with learned EOS to a multiple of {settings.get('block_length')}"
    objective = _OBJECTIVES.get(settings.get("loss_weighting", ""))
    if settings.get("guidance_distillation_scale"):
        objective = (
            f"divergence from the initial model under guidance of scale {settings['guidance_distillation_scale']}"
        )
    seeds = [f"{key} {settings[key]}" for key in ("seed", "noise_seed") if key in settings]
    rows = {
        "objective": objective,
        "noise schedule": schedule,
        "EOS policy": eos,
        "guidance training": _guidance(settings),
        **{label: settings.get(name) for name, label in _TRAINING_ROWS.items()},
        "precision": next((f"{name} autocast" for name in ("bf16", "fp16") if settings.get(name)), None),
        "steps": _count(training.get("steps")),
        "epochs": f"{training['epochs']:.2f}" if training.get("epochs") else None,
        "tokens": _count(training.get("tokens")),
        "seeds": ", ".join(seeds),
        "hardware": training.get("hardware"),
        "versions": ", ".join(f"{name} {number}" for name, number in (training.get("versions") or {}).items()),
    }
    table = _table("Training", rows)
    recipe = f"All settings: [`{RECIPE_FILE}`]({RECIPE_FILE})." if facts.recipe else ""
    return "\n\n".join(part for part in (table, recipe) if part)


def loading_section(facts: CheckpointFacts, name: str) -> str:
    """What works with transformers' Auto classes, and what works without dlm_tune."""
    if facts.is_adapter:
        text = (
            "The adapter lies in PEFT's format. Its layer names are those of transformers' own modules, so without "
            "dlm_tune it fits a model whose layers have these names, made bidirectional (`config.is_causal = False`). "
            "For everyone else, `dlm-tune merge` makes a whole checkpoint of adapter and base."
        )
        return f"## Without dlm_tune\n\n{text}"
    auto = f"""## With transformers' Auto classes

```python
import dlm_tune  # its models are then known to the Auto classes; no remote code
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```"""
    return f"{auto}\n\n## Without dlm_tune\n\n{_without_dlm_tune(facts, name)}"


def _without_dlm_tune(facts: CheckpointFacts, name: str) -> str:
    if not facts.authors_layout:
        return (
            "The weights have the names of transformers' modules, which the authors' code does not know: "
            "`dlm-tune merge --layout original` writes a checkpoint for it."
        )
    if facts.auto_map is not None:
        code = next(iter(facts.auto_map.values())).split("--")[0]
        return (
            "Weights and config.json are in the authors' layout. "
            f'`AutoModel.from_pretrained("{name}", trust_remote_code=True)` runs the modelling code of '
            f"[{code}](https://hf.co/{code}), to which `auto_map` in config.json points; use the version of "
            "transformers that this code asks for, and the authors' own sampler."
        )
    shift = " The logits at position i - 1 predict position i." if facts.logits_shift else ""
    return (
        f'`AutoModelForCausalLM.from_pretrained("{name}")` of transformers 5 loads the weights and attends in both '
        "directions, because config.json says `is_causal: false`; earlier versions do not know this key and would "
        f"read from left to right. Its `generate` is no sampler for masked diffusion.{shift}"
    )


def _example_sampler(facts: CheckpointFacts) -> dict[str, Any]:
    measured = (facts.evaluation.get("completions") or {}).get("generation")
    if measured:
        return {key: measured[key] for key in ("max_new_tokens", "block_length", "steps") if key in measured}
    block = facts.settings.get("block_length") or _BLOCK
    positions = next(
        (facts.config[key] for key in ("max_position_embeddings", "max_sequence_length") if key in facts.config), None
    )
    room = _CANVAS if positions is None else min(_CANVAS, positions // 2)
    block = min(block, max(room, 1))
    # an answer that was trained as one short canvas is sampled as one
    canvas = room // block * block if block >= _BLOCK else block
    return {"max_new_tokens": canvas, "block_length": block, "steps": canvas}


def _shift(logits_shift: bool | None) -> str | None:
    if logits_shift is None:
        return None
    return "yes: position i is predicted at position i - 1" if logits_shift else "no: position i is predicted at i"


def _guidance(settings: dict[str, Any]) -> str:
    parts = [
        f"{label} {settings[name]}"
        for name, label in (
            ("prompt_dropout", "prompt dropout"),
            ("prompt_noising", "prompts noised too, share"),
            ("unpaired_fraction", "unpaired rows, share"),
            ("guidance_keep_tokens", "kept prompt tokens"),
            ("guidance_distillation_scale", "distilled, scale"),
        )
        if name in settings
    ]
    if parts:
        return ", ".join(parts)
    return "none: prompts were never hidden" if settings else ""


def _figure(metrics: dict[str, Any], name: str) -> str:
    error = metrics.get(f"{name}_standard_error")
    return f"{metrics[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _table(title: str, rows: dict[str, Any]) -> str:
    known = {label: value for label, value in rows.items() if value not in (None, "", [])}
    if not known:
        return ""
    cells = [f"| {label} | {str(value).replace('|', chr(92) + '|')} |" for label, value in known.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *cells])
