"""CPU time and peak memory of a whole training step: DiffusionTrainer against the same step in plain torch.

    python benchmarks/step_time.py                      # about ten minutes on one core
    python benchmarks/step_time.py --setup lora --steps 5

Four implementations of a step, each in its own process, with the same weights, the same optimiser (AdamW, gradients
clipped to norm 1) and the very batches that the trainer's `corrupt_batches` made; the losses must agree:

- `dense`: logits at all positions, cross-entropy, weights;
- `masked`: the LM head at masked positions, all logits kept for the backward pass;
- `chunked`: the LM head at masked positions in chunks of 256 rows, computed again in the backward pass;
- `dlm_tune`: a step of `DiffusionTrainer.train()` from the end of the step before it, so with the data loader, the
  noise, the statistics and the log.

Seconds are CPU seconds of the process (user and system), the fastest and the median step after one to warm up.
Memory is the largest resident memory during a step above what is held between steps (weights, optimiser state).
The exit status is 1 if in a setup dlm_tune takes more than 1.15 times the best time or the best memory of the three
others, or more than 0.7 times the time of `dense`. Linux only.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETUPS = {
    "full": "full pretraining",
    "lora": "LoRA r = 8, pretraining",
    "sft": "full SFT, half of each row prompt",
}
PLAIN = ("dense", "masked", "chunked")
MAX_BOUND_RATIO, MAX_DENSE_RATIO = 1.15, 0.7
CHUNK_ROWS = 256
LEARNING_RATE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", choices=list(SETUPS), action="append", help="default: all three")
    parser.add_argument("--batch", type=int, default=4, help="rows B (default 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row L (default 512)")
    parser.add_argument("--width", type=int, default=256, help="hidden width D (default 256)")
    parser.add_argument("--layers", type=int, default=4, help="layers (default 4)")
    parser.add_argument("--vocab", type=int, default=126464, help="vocabulary V (default 126464, LLaDA's)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps (default 3)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--worker", nargs=3, metavar=("SETUP", "COLUMN", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments, *arguments.worker)))
        return 0
    print(
        f"B {arguments.batch}, L {arguments.length}, d {arguments.width}, {arguments.layers} layers, "
        f"V {arguments.vocab}, {'bfloat16 autocast' if arguments.bf16 else 'float32'}, one thread"
    )
    print("| setup | step | CPU s, min (median) | / time bound | / dense | peak MiB | / memory bound |")
    print("|---|---|---|---|---|---|---|")
    faults = [fault for setup in arguments.setup or SETUPS for fault in compare(setup)]
    for fault in faults:
        print(f"FAILED: {fault}")
    return 1 if faults else 0


def compare(setup: str) -> list[str]:
    """Run the columns of a setup, print their rows and return what is above the limits."""
    with tempfile.TemporaryDirectory() as folder:
        results = {column: run_worker(setup, column, folder) for column in ("dlm_tune", *PLAIN)}
    best_time = min(results[column]["seconds"] for column in PLAIN)
    best_memory = min(results[column]["mebibytes"] for column in PLAIN)
    ratios = {}
    for column in (*PLAIN, "dlm_tune"):
        row = results[column]
        ratios = {
            "the time bound": row["seconds"] / best_time,
            "dense": row["seconds"] / results["dense"]["seconds"],
            "the memory bound": row["mebibytes"] / best_memory,
        }
        print(
            f"| {SETUPS[setup]} | {column} | {row['seconds']:.2f} ({row['median']:.2f}) | "
            f"{ratios['the time bound']:.2f} | {ratios['dense']:.2f} | {row['mebibytes']:,.0f} | "
            f"{ratios['the memory bound']:.2f} |",
            flush=True,
        )
        for ours, theirs in zip(results["dlm_tune"]["losses"], row["losses"], strict=True):
            assert abs(ours - theirs) <= 1e-3 * abs(theirs), f"{setup}, {column}: loss {theirs}, dlm_tune {ours}"
    limits = {"the time bound": MAX_BOUND_RATIO, "dense": MAX_DENSE_RATIO, "the memory bound": MAX_BOUND_RATIO}
    return [
        f"{SETUPS[setup]}: {ratios[name]:.2f} times {name}, more than {limit}"
        for name, limit in limits.items()
        if ratios[name] > limit
    ]


def run_worker(setup: str, column: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", setup, column, folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    completed = subprocess.run(command, capture_output=True, text=True, env=environment)
    if completed.returncode:
        raise SystemExit(completed.stderr[-3000:])
    return json.loads(completed.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, setup: str, column: str, folder: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    meter = Meter()
    batches = Path(folder) / "batches.pt"
    if column == "dlm_tune":
        losses = train(arguments, setup, meter, batches)
    else:
        losses = train_plainly(arguments, setup, column, meter, batches)
    seconds = meter.seconds[1:]
    return {
        "seconds": min(seconds),
        "median": statistics.median(seconds),
        "mebibytes": max(meter.mebibytes[1:]),
        "losses": losses,
    }


class Meter:
    """CPU seconds and peak memory, in MiB above what was held at its start, of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.mebibytes: list[float] = []
        self.start: float | None = None
        self.base = 0.0

    def lap(self) -> None:
        """End a step, if one has begun, and begin the next."""
        now = time.process_time()
        if self.start is not None:
            self.seconds.append(now - self.start)
            self.mebibytes.append(_status("VmHWM") - self.base)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.base = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self.start = time.process_time()


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def build_model(arguments: argparse.Namespace, setup: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    from dlm_tune.models import LLaDAConfig, LLaDAModelLM

    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=arguments.width,
        n_layers=arguments.layers,
        n_heads=4,
        mlp_hidden_size=4 * arguments.width,
        vocab_size=arguments.vocab,
        embedding_size=arguments.vocab,
        max_sequence_length=arguments.length,
        mask_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LLaDAModelLM(config).train()
    if setup == "lora":
        return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    return model


def make_rows(arguments: argparse.Namespace, setup: str) -> Any:
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch * (arguments.steps + 1), arguments.length)
    tokens = torch.randint(2, arguments.vocab, shape, generator=generator)
    labels = tokens.clone()
    if setup == "sft":
        labels[:, : arguments.length // 2] = -100
    rows = range(len(tokens))
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist(), "row_index": list(rows)})


def train(arguments: argparse.Namespace, setup: str, meter: Meter, batches_file: Path) -> list[float]:
    """Train with DiffusionTrainer and save the batches that it trained on."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    from dlm_tune import DiffusionConfig, DiffusionTrainer

    recorded: list[dict[str, Any]] = []

    class RecordingTrainer(DiffusionTrainer):
        def corrupt_batches(self, batches: list[dict[str, Any]], step: int, epoch: int) -> None:
            super().corrupt_batches(batches, step, epoch)
            recorded.append({**batches[0], "noisy": vars(batches[0]["noisy"]).copy()})

    class MeterCallback(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.lap()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.lap()

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<mask>": 0, "<eos>": 1}, unk_token="<eos>")),
        mask_token="<mask>",
        eos_token="<eos>",
        pad_token="<eos>",
    )
    config = DiffusionConfig(
        output_dir=str(batches_file.parent / "output"),
        per_device_train_batch_size=arguments.batch,
        max_steps=arguments.steps + 1,
        max_length=arguments.length,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        eos_policy="none",
        gradient_checkpointing=False,
        bf16=arguments.bf16,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RecordingTrainer(
        model=build_model(arguments, setup),
        args=config,
        train_dataset=make_rows(arguments, setup),
        processing_class=tokenizer,
        callbacks=[MeterCallback()],
    )
    trainer.train()
    torch.save(recorded, batches_file)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_plainly(
    arguments: argparse.Namespace, setup: str, column: str, meter: Meter, batches_file: Path
) -> list[float]:
    """The same steps in plain torch, on the saved batches."""
    import torch

    model = build_model(arguments, setup)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = torch.load(batches_file, weights_only=False)
    loss_function = _LOSSES[column]
    losses = []
    meter.lap()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss = loss_function(model.get_base_model() if setup == "lora" else model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        meter.lap()
    return losses


def dense_loss(model: Any, batch: dict[str, Any]) -> Any:
    import torch.nn.functional as F

    tokens = batch["noisy"]["noisy_input_ids"]
    logits = model(input_ids=tokens, attention_mask=batch["attention_mask"]).logits.flatten(0, 1).float()
    nll = F.cross_entropy(logits, batch["input_ids"].flatten(), reduction="none")
    return (nll * batch["loss_weights"].flatten()).sum()


def masked_loss(model: Any, batch: dict[str, Any]) -> Any:
    hidden, targets, weights = _masked_states(model, batch)
    return (_nll(model.lm_head, hidden, targets) * weights).sum()


def chunked_loss(model: Any, batch: dict[str, Any]) -> Any:
    import torch
    from torch.utils.checkpoint import checkpoint

    hidden, targets, weights = _masked_states(model, batch)
    chunks = zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
    nll = torch.cat([checkpoint(_nll, model.lm_head, *chunk, use_reentrant=False) for chunk in chunks])
    return (nll * weights).sum()


def _masked_states(model: Any, batch: dict[str, Any]) -> tuple[Any, Any, Any]:
    masked = batch["noisy"]["masked"]
    tokens = batch["noisy"]["noisy_input_ids"]
    hidden = model.model(input_ids=tokens, attention_mask=batch["attention_mask"]).last_hidden_state[masked]
    return hidden, batch["input_ids"][masked], batch["loss_weights"][masked]


def _nll(head: Any, hidden: Any, targets: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


_LOSSES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "dense": dense_loss,
    "masked": masked_loss,
    "chunked": chunked_loss,
}


if __name__ == "__main__":
    sys.exit(main())
