"""`dlm-tune inspect --estimate`: what a recipe will do, before any weight is loaded."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedConfig
from trl import ModelConfig

from dlm_tune.commands.adapter import adapter_config
from dlm_tune.commands.console import say
from dlm_tune.commands.estimate_figures import (
    DataFigures,
    StepFigures,
    collected_warnings,
    data_figures,
    step_figures,
)
from dlm_tune.commands.inspect_batch import base_config, data_only_trainer
from dlm_tune.data import PackedRows
from dlm_tune.models import embedding_rows
from dlm_tune.models.memory import MemoryEstimate, StepSetup, estimate_step_memory
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from dlm_tune.trainers.statistics import BUCKET_NAMES

_GIB, _MIB = 2**30, 2**20
_QUANTILES = (0, 10, 50, 90, 99, 100)
# CUDA context and loaded kernels: an assumption, not measured
_ACCELERATOR_BASE = _GIB // 2
_KINDS = {
    "weights": "weights",
    "optimizer_state": "optimiser state",
    "gradients": "gradients",
    "activations": "activations",
    "backward": "backward pass",
    "lm_head": "LM head",
    "cast_weights": "weights in autocast's type",
    "optimizer_update": "update of the optimiser",
}
# Keys that change memory in ways that are not modelled
_NOT_COUNTED = (
    "activation_offloading",
    "torch_compile",
    "deepspeed",
    "fsdp",
    "use_liger_kernel",
    "guidance_distillation_scale",
)


def run_estimate(model_arguments: ModelConfig, data_arguments: Any, config: DiffusionConfig) -> None:
    """Print counts of the data and of a step, the loss to expect, and the memory of a step."""
    with collected_warnings() as notes:
        trainer = data_only_trainer(model_arguments, data_arguments, config)
    data, steps = data_figures(trainer), step_figures(trainer)
    _, model_config = base_config(model_arguments)
    setup = step_setup(trainer, data, steps, model_arguments, model_config)
    memory = estimate_step_memory(model_config, setup)
    say(
        *describe_data(data, notes, config),
        "",
        *describe_steps(data, steps, config),
        "",
        *describe_loss(data, steps, embedding_rows(model_config), config),
        "",
        *describe_memory(memory, setup, config),
    )


def step_setup(
    trainer: DiffusionTrainer,
    data: DataFigures,
    steps: StepFigures,
    model_arguments: ModelConfig,
    model_config: PreTrainedConfig,
) -> StepSetup:
    """The largest microbatch of a recipe and how it is trained on."""
    config = trainer.args
    packed = trainer.train_dataset if isinstance(trainer.train_dataset, PackedRows) else None
    num_sequences = min(config.per_device_train_batch_size, len(trainer.train_dataset))
    if packed is None:
        length, num_targets = int(data.lengths.max()), int(data.num_targets.max())
        if config.eos_policy == "pad_to_max":  # filled up to the longest row
            num_targets = length
    else:
        length = max(int(data.lengths[rows].sum()) for rows in packed.plan)
        num_targets = max(int(data.num_targets[rows].sum()) for rows in packed.plan)
    multiple = config.pad_to_multiple_of or 1
    dtype = model_arguments.dtype
    if dtype == "auto":
        dtype = model_config.dtype or torch.float32
    elif dtype is None:
        dtype = torch.float32 if config.use_cpu else torch.bfloat16
    return StepSetup(
        num_sequences=num_sequences,
        length=-(-length // multiple) * multiple,
        num_targets=num_sequences * num_targets,
        has_mask=steps.is_padded or (len(np.unique(data.lengths)) > 1 and num_sequences > 1),
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        autocast_dtype=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None,
        quantization="4bit" if model_arguments.load_in_4bit else "8bit" if model_arguments.load_in_8bit else None,
        double_quantization=model_arguments.use_bnb_nested_quant,
        peft_config=adapter_config(model_arguments),
        gradient_checkpointing=config.gradient_checkpointing,
        accumulates=config.gradient_accumulation_steps > 1,
        optim=getattr(config.optim, "value", config.optim),
        on_accelerator=not config.use_cpu,
        attn_implementation=model_arguments.attn_implementation,
    )


def _line(name: str, value: str, remark: str = "") -> str:
    return f"  {name:<28}{value:>14}  {remark}".rstrip()


def describe_data(data: DataFigures, notes: list[str], config: DiffusionConfig) -> Iterator[str]:
    """Lines on the training rows."""
    tokens, targets = int(data.lengths.sum()), int(data.num_targets.sum())
    fill = ", not what fills up to the longest of a batch" if config.eos_policy == "pad_to_max" else ""
    yield "Training data"
    yield _line("rows", f"{len(data.lengths):,}")
    yield from (f"    {note}" for note in notes)
    yield _line("tokens", f"{tokens:,}", f"with the EOS of eos_policy: {config.eos_policy}{fill}")
    yield _line("targets", f"{targets:,}", f"{targets / tokens:.1%} of the tokens are supervised")
    for name, values in (("tokens of a row", data.lengths), ("targets of a row", data.num_targets)):
        quantiles = np.percentile(values, _QUANTILES, method="inverted_cdf").astype(int).tolist()
        names = ("smallest", "10 %", "median", "90 %", "99 %", "largest")
        yield _line(name, "", ", ".join(f"{label} {value:,}" for label, value in zip(names, quantiles, strict=True)))


def describe_steps(data: DataFigures, steps: StepFigures, config: DiffusionConfig) -> Iterator[str]:
    """Lines on an optimiser step and on the run."""
    sample = f"mean of the first {steps.num_sampled} steps" if steps.num_sampled > 1 else "the first step"
    yield f"An optimiser step of one process ({sample} of the run)"
    kind = "packed sequences" if config.packing else "rows"
    microbatches = config.gradient_accumulation_steps
    batch = f"{config.per_device_train_batch_size} {kind} x {microbatches} microbatch{'es' * (microbatches > 1)}"
    yield _line("rows", f"{steps.rows:,.1f}", batch)
    yield _line("positions", f"{steps.positions:,.0f}", "what the model computes, padding included")
    yield _line("padding", f"{steps.padding:.1%}", "of the positions hold no token")
    yield _line("tokens", f"{steps.tokens:,.0f}")
    yield _line("targets", f"{steps.targets:,.0f}", "supervised tokens")
    yield _line("masked, expected", f"{steps.masked:,.0f}", f"{config.masking}, schedule {config.noise_schedule}")
    yield "The run"
    yield _line("steps in an epoch", f"{steps.steps_per_epoch:,}", "with N processes, a step holds N times as much")
    epochs = steps.total_steps / steps.steps_per_epoch
    yield _line("steps", f"{steps.total_steps:,}", f"{epochs:.3g} epochs")
    yield _line("tokens", f"{epochs * int(data.lengths.sum()):,.0f}", "of one process")


def describe_loss(data: DataFigures, steps: StepFigures, vocab_size: int, config: DiffusionConfig) -> Iterator[str]:
    """Lines on the loss to expect; what is experience and not computed says so."""
    random, unigram = math.log(vocab_size), data.unigram_entropy
    count = "nats per target token"
    yield f"Loss to expect (`nelbo` of the log, {count})"
    yield _line("random weights", f"{random:.2f}", f"ln {vocab_size:,}; a little more where initial logits are large")
    yield _line(
        "token frequencies alone",
        f"{unigram:.2f}",
        f"entropy of the targets, {data.num_kinds:,} kinds; a sample this large lowers it by {data.entropy_bias:.2g}",
    )
    yield _line("pretrained 8B, by experience", "2 - 3", "on text like its own; answers given their prompt 0.3 - 1.5")
    if config.loss_weighting != "nelbo":
        yield _line(
            "loss / nelbo", f"{steps.weight_mean:.2f}", f"of equal tokens: the weights of loss_weighting: "
            f"{config.loss_weighting} add up to it, so `loss` starts at {steps.weight_mean * random:.2f}",
        )  # fmt: skip
    if not math.isnan(steps.weight_deviation):
        share = steps.weight_deviation / steps.weight_mean if steps.weight_mean else 0.0
        yield _line("noise of the weights alone", f"{share:.1%}", "standard deviation of a step's sum of weights")
    names = [f"{int(low)}-{int(high)} %" for low, high in (name.split("_") for name in BUCKET_NAMES)]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, steps.bucket_share, strict=True))
    yield _line("rows by masked share", "", shares)
    yield "  For rows of like length, nll_masked_75_100 of the log must be largest and nll_masked_00_25 smallest."


def describe_memory(memory: MemoryEstimate, setup: StepSetup, config: DiffusionConfig) -> Iterator[str]:
    """Lines on the memory of one process, without sharding."""
    unit, name = (_GIB, "GiB") if memory.total >= _GIB else (_MIB, "MiB")

    def size(value: float) -> str:
        return f"{value / unit:,.2f}" if value < 100 * unit else f"{value / unit:,.0f}"

    totals = {phase: sum(terms.values()) for phase, terms in memory.phases.items()}
    phase = max(totals, key=totals.__getitem__)
    others = ", ".join(f"{other} {size(total)}" for other, total in totals.items() if other != phase)
    yield f"Memory of one process, {name}, at the largest moment: {phase} (at the other: {others})"
    remarks = _remarks(memory, setup)
    terms = sorted(memory.phases[phase].items(), key=lambda term: -term[1])
    yield from (_line(_KINDS[kind], size(value), remarks.get(kind, "")) for kind, value in terms if value)
    yield _line("tensors together", size(memory.total), f"the largest term: {_KINDS[terms[0][0]]}")
    if config.use_cpu:
        base, remark = psutil.Process().memory_info().rss, "libraries and data, as in this process now"
    else:
        base, remark = _ACCELERATOR_BASE, "context and kernels of the accelerator, an assumption"
    yield _line("beside tensors", size(base), remark)
    device, available = device_memory(config)
    total = memory.total + base
    verdict = "fits" if available and total < 0.95 * available else "does not fit"
    known = "" if available is None else f" has {size(available)}: it {verdict}"
    yield _line("all", size(total), device + known)
    if config.use_cpu:
        yield "  Not counted: freed memory that malloc keeps, 1.1 to 3 times the tensors in all where it was measured;"
        yield "  with MALLOC_MMAP_THRESHOLD_=65536 in the environment it keeps none."
    if memory.optimizer_state is None:
        yield f"  Not counted: the state of optim: {setup.optim}, which is not known here."
    ignored = [key for key in _NOT_COUNTED if getattr(config, key, None)]
    if ignored:
        yield f"  Not counted: what {', '.join(ignored)} changes."


def _remarks(memory: MemoryEstimate, setup: StepSetup) -> dict[str, str]:
    number = f"{memory.num_parameters:,} parameters"
    kind = {"4bit": "linear layers in 4 bits", "8bit": "linear layers in 8 bits", None: ""}[setup.quantization]
    dtype = str(setup.dtype).removeprefix("torch.")
    how = "layers run again in the backward pass" if setup.gradient_checkpointing else "kept for the backward pass"
    return {
        "weights": f"{number}, {', '.join(filter(None, (dtype, kind)))}",
        "optimizer_state": f"{setup.optim}, {memory.num_trainable:,} trained",
        "gradients": "" if setup.accumulates else "those that exist at this moment",
        "activations": f"{setup.num_sequences} x {setup.length:,} tokens, {how}",
        "lm_head": f"{setup.num_targets:,} masked tokens",
    }


def device_memory(config: DiffusionConfig) -> tuple[str, int | None]:
    """Name and memory of the device that the recipe trains on here."""
    if config.use_cpu:
        return "this machine", psutil.virtual_memory().total
    device = config.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    return str(device), None
