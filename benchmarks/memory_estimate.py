"""Estimated against measured peak memory of training, on the CPU, for models of 5 to 60 million parameters.

    OMP_NUM_THREADS=1 python benchmarks/memory_estimate.py                  # all cases, under ten minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/memory_estimate.py "full, 25M" "LoRA, 25M"

Each case trains two steps with `DiffusionTrainer` in its own process. Before, a tiny model is trained there for one
step, so that libraries have what they keep. Measured is the largest resident memory from then on, above the one before
the model was made; estimated is what `dlm-tune inspect --estimate` prints as "tensors together". Freed memory is given
back to the system at once (glibc's MALLOC_MMAP_THRESHOLD_, set for the processes): otherwise some of it stays resident
in holes of the heap. The column "default malloc" is measured without that setting, with `--default-malloc`.

The exit status is 1 if an estimate is off by more than 20 %. Linux only (/proc).
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback
from transformers.utils import logging

from dlm_tune import DiffusionConfig, DiffusionTrainer
from dlm_tune.models import LLaDAConfig, LLaDAModelLM
from dlm_tune.models.memory import StepSetup, estimate_step_memory

TOLERANCE = 0.2
MEBIBYTE = 2**20
EOS_ID, MASK_ID = 0, 1
NAMED_TOKENS = 64  # of the stand-in tokenizer; the model's vocabulary may be larger
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    width: int
    layers: int
    vocab: int = 4096
    rows: int = 8
    length: int = 256
    lora: bool = False
    equal_rows: bool = True
    config: dict[str, Any] = field(default_factory=dict)


_SMALL, _MIDDLE, _LARGE = {"width": 256, "layers": 5}, {"width": 512, "layers": 6}, {"width": 768, "layers": 7}
CASES = {
    "full, 6M": Case(**_SMALL),
    "full, 25M": Case(**_MIDDLE),
    "full, 60M": Case(**_LARGE, rows=4),
    "full, 25M, checkpointing": Case(**_MIDDLE, config={"gradient_checkpointing": True}),
    "full, 60M, checkpointing": Case(**_LARGE, rows=4, config={"gradient_checkpointing": True}),
    "full, 25M, two microbatches": Case(**_MIDDLE, rows=4, config={"gradient_accumulation_steps": 2}),
    "full, 25M, bf16 autocast": Case(**_MIDDLE, config={"bf16": True}),
    "full, 25M, rows padded": Case(**_MIDDLE, equal_rows=False),
    "full, 25M, packed": Case(**_MIDDLE, equal_rows=False, config={"packing": True}),
    "full, 25M, adamw_torch": Case(**_MIDDLE, rows=1, config={"optim": "adamw_torch"}),
    "full, 25M, sgd": Case(**_MIDDLE, rows=2, config={"optim": "sgd"}),
    "full, 38M, V = 50,000": Case(width=256, layers=15, vocab=50_000, rows=2),
    "LoRA, 6M": Case(**_SMALL, lora=True),
    "LoRA, 25M": Case(**_MIDDLE, lora=True),
    "LoRA, 60M, checkpointing": Case(**_LARGE, lora=True, config={"gradient_checkpointing": True}),
    "LoRA, 25M, bf16 autocast": Case(**_MIDDLE, lora=True, config={"bf16": True}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[], metavar="CASE", help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--default-malloc", action="store_true", help="measure with malloc's own settings too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(CASES[arguments.worker])))
        return 0
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}: choose from {'; '.join(CASES)}")
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; MiB")
    more = "default malloc | " if arguments.default_malloc else ""
    print(f"| case | parameters | trained | estimated | measured | estimated / measured | {more}largest term |")
    print("|---|---|---|---|---|---|" + "---|" * (2 if more else 1))
    worst = 0.0
    for name in arguments.cases or CASES:
        result = run_worker(name, returns_memory=True)
        ratio = result["estimated"] / result["measured"]
        worst = max(worst, abs(ratio - 1))
        cells = [name, f"{result['parameters']:,}", f"{result['trained']:,}", f"{result['estimated']:,.0f}"]
        cells += [f"{result['measured']:,.0f}", f"{ratio:.2f}"]
        cells += [f"{run_worker(name, returns_memory=False)['measured']:,.0f}"] if more else []
        print("| " + " | ".join([*cells, result["largest"]]) + " |", flush=True)
    print(f"largest deviation: {worst:.1%}")
    return int(worst > TOLERANCE)


def run_worker(name: str, returns_memory: bool) -> dict[str, Any]:
    threshold = {"MALLOC_MMAP_THRESHOLD_": str(2**16)} if returns_memory else {}
    command = [sys.executable, __file__, "--worker", name]
    completed = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threshold)
    return json.loads(completed.stdout.splitlines()[-1])


def measure(case: Case) -> dict[str, Any]:
    """Measure first: the estimate's own work must not be part of it."""
    logging.set_verbosity_error()
    disable_progress_bars()
    train(Case(width=64, layers=1, vocab=NAMED_TOKENS, rows=2, length=16, lora=case.lora), steps=1)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident memory starts anew
    before = status_bytes("VmRSS")
    length = train(case, steps=2)
    measured = status_bytes("VmHWM") - before
    estimate = estimate_step_memory(model_config(case), step_setup(case, length))
    terms = max(estimate.phases.values(), key=lambda phase: sum(phase.values()))
    return {
        "parameters": estimate.num_parameters,
        "trained": estimate.num_trainable,
        "estimated": estimate.total / MEBIBYTE,
        "measured": measured / MEBIBYTE,
        "largest": max(terms, key=terms.__getitem__),
    }


def status_bytes(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def model_config(case: Case) -> LLaDAConfig:
    return LLaDAConfig(
        d_model=case.width,
        n_layers=case.layers,
        n_heads=case.width // 64,
        mlp_hidden_size=3 * case.width,
        vocab_size=case.vocab,
        max_sequence_length=case.length,
        mask_token_id=MASK_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )


def adapter(case: Case) -> LoraConfig | None:
    return LoraConfig(r=16, target_modules=MODULES) if case.lora else None


def step_setup(case: Case, length: int) -> StepSetup:
    """As `dlm-tune inspect --estimate` makes it of a recipe."""
    return StepSetup(
        num_sequences=case.rows,
        length=length,
        num_targets=case.rows * length,
        has_mask=not case.equal_rows,
        autocast_dtype=torch.bfloat16 if case.config.get("bf16") else None,
        peft_config=adapter(case),
        gradient_checkpointing=case.config.get("gradient_checkpointing", False),
        accumulates=case.config.get("gradient_accumulation_steps", 1) > 1,
        optim=case.config.get("optim", "adamw_torch_fused"),
    )


def make_rows(case: Case) -> Dataset:
    """Text rows, of equal length; else half of them shorter, which packing puts together."""
    count = 2 * case.rows * case.config.get("gradient_accumulation_steps", 1)
    generator = torch.Generator().manual_seed(0)
    is_half = [not case.equal_rows and index % 2 == 1 for index in range(count)]
    lengths = [case.length // 2 if half else case.length for half in is_half]
    rows = [
        [*torch.randint(MASK_ID + 1, NAMED_TOKENS, (length - 1,), generator=generator).tolist(), EOS_ID]
        for length in lengths
    ]
    if case.config.get("packing"):  # two rows of half the length fill a sequence
        rows += [row for row in rows if len(row) < case.length]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def train(case: Case, steps: int) -> int:
    """Train, and return the length of the longest sequence."""
    torch.manual_seed(0)
    vocabulary = {f"t{index}": index for index in range(NAMED_TOKENS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t2")), eos_token="t0", pad_token="t0"
    )
    defaults = {"gradient_checkpointing": False, "bf16": False, "per_device_train_batch_size": case.rows}
    with tempfile.TemporaryDirectory() as folder:
        settings = DiffusionConfig(
            output_dir=folder,
            max_steps=steps,
            max_length=case.length,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **(defaults | case.config),
        )
        model = LLaDAModelLM(model_config(case))
        trainer = DiffusionTrainer(
            model, settings, make_rows(case), processing_class=tokenizer, peft_config=adapter(case)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return case.length


if __name__ == "__main__":
    sys.exit(main())
