"""What each EOS policy does to the loss and to the lengths of generated answers, on the quickstart's task.

    python examples/quickstart/eos_policies.py      # the tables of docs/eos-and-length.md
    python examples/quickstart/eos_policies.py --steps 1600 --output_dir outputs/eos-long

Trains one adapter per policy with `dlm-tune sft` and the quickstart's recipe, on the same tokenised rows without an
EOS of their own, then completes held-out prompts on several canvases. To test the plumbing only: --smoke.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from inflection_data import DEFAULT_OUTPUT_DIR as DATA
from inflection_data import hash_fraction, write_jsonl, write_pairs

from dlm_tune import DiffusionGenerationConfig, load_model, load_tokenizer
from dlm_tune.data import DiffusionCollator
from dlm_tune.data.arguments import EOS_POLICIES
from dlm_tune.evaluation.likelihood import estimate_nelbo
from dlm_tune.generation import config_for_tokenizer, generate, pad_prompts

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/quickstart/sft/lora.yaml"
BLOCK_LENGTH = 18  # the recipe's: the longest answer and its EOS
MAX_LENGTH = 64  # the recipe's
LIKELIHOOD_BATCHES = (8, 64)  # rows per batch: only pad_to_max depends on them
NUM_NOISE_SAMPLES = 16


@dataclass(frozen=True)
class Canvas:
    """What the sampler fills: so many masks, in blocks, one token a step.

    `max_new_tokens=None` is the right answer's own length and one for EOS, which nobody knows in practice.
    """

    max_new_tokens: int | None
    block_length: int | None
    suppress_eos_confidence: bool = False


CANVASES = (
    Canvas(None, None),
    Canvas(18, 18),
    Canvas(18, 6),
    Canvas(36, 36),
    Canvas(36, 36, suppress_eos_confidence=True),
    Canvas(36, 18),
    Canvas(72, 18),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps of each policy, 32 pairs a step")
    parser.add_argument("--num_prompts", type=int, default=100, help="held-out prompts to complete")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's initial weights, row order and noise")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/eos"))
    parser.add_argument("--smoke", action="store_true", help="two steps, four prompts and two canvases")
    return parser.parse_args()


def tokenise(rows: list[dict], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Rows of `input_ids` and `labels`, the answer a target, without EOS: what ends it is left to the policy.

    Of text rows TRL itself ends the completion, so that `none` and `one` are the same there.
    """
    tokenised = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        tokenised.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return tokenised


def train(policy: str, files: list[dict[str, Any]], arguments: argparse.Namespace) -> Path:
    """Run the quickstart's recipe with one policy; returns the adapter's folder."""
    folder = arguments.output_dir / policy
    recipe = yaml.safe_load(RECIPE.read_text())
    for key in ("eval_dataset_name", "block_length"):
        recipe.pop(key)
    recipe |= {
        "output_dir": str(folder),
        "datasets": files,
        "eos_policy": policy,
        "max_steps": arguments.steps,
        "seed": arguments.seed,
        "noise_seed": arguments.seed,
    }
    if policy == "pad_to_block":
        recipe["block_length"] = BLOCK_LENGTH
    path = arguments.output_dir / f"{policy}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = ["sft", "--config", str(path), "--overwrite_output_dir"]
    print("$ dlm-tune", *command, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "dlm_tune", *command], check=True, stdout=sys.stderr)
    return folder


def make_collator(policy: str, tokenizer: Any) -> DiffusionCollator:
    """The collator of the training, for batches of `row_index`ed rows."""
    return DiffusionCollator(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        eos_policy=policy,
        block_length=BLOCK_LENGTH if policy == "pad_to_block" else None,
        max_length=MAX_LENGTH,
    )


def measure_likelihood(model: Any, collator: DiffusionCollator, rows: list[dict], batch_size: int) -> dict[str, float]:
    """Held-out NELBO in nats per token and per answer, with standard errors over rows, and what the targets are."""
    nats, num_tokens, num_eos = [], [], 0
    for start in range(0, len(rows), batch_size):
        indexed = [row | {"row_index": start + i} for i, row in enumerate(rows[start : start + batch_size])]
        batch = collator(indexed)
        estimate = estimate_nelbo(
            model,
            batch["input_ids"],
            batch["target_mask"],
            batch["attention_mask"],
            num_samples=NUM_NOISE_SAMPLES,
            row_keys=batch["row_index"],
        )
        nats.append(estimate.nats)
        num_tokens.append(estimate.num_tokens.double())
        num_eos += int((batch["target_mask"] & (batch["input_ids"] == collator.eos_token_id)).sum())
    answer_nats, targets = torch.cat(nats), torch.cat(num_tokens)
    per_token = float(answer_nats.sum() / targets.sum())
    residuals = answer_nats - targets * per_token  # ratio of two sums: delta method
    return {
        "targets": float(targets.mean()),
        "eos_share": num_eos / float(targets.sum()),
        "nats_per_token": per_token,
        "nats_per_token_error": math.sqrt(residuals.square().sum() * len(rows) / (len(rows) - 1))
        / float(targets.sum()),
        "nats_per_answer": float(answer_nats.mean()),
        "nats_per_answer_error": float(answer_nats.std() / math.sqrt(len(rows))),
    }


def complete(model: Any, tokenizer: Any, rows: list[dict], canvas: Canvas, batch_size: int = 64) -> list[list[int]]:
    """New tokens of each row, the whole canvas."""
    if canvas.max_new_tokens is None:
        lengths = [sum(label != -100 for label in row["labels"]) + 1 for row in rows]
        answers: dict[int, list[int]] = {}
        for length in sorted(set(lengths)):
            members = [index for index, own in enumerate(lengths) if own == length]
            canvas_of_length = Canvas(length, length, canvas.suppress_eos_confidence)
            completed = complete(model, tokenizer, [rows[index] for index in members], canvas_of_length, batch_size)
            answers.update(zip(members, completed, strict=True))
        return [answers[index] for index in range(len(rows))]
    options = DiffusionGenerationConfig(steps=canvas.max_new_tokens, **asdict(canvas))
    config = config_for_tokenizer(options, tokenizer, model)
    prompts = [
        [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100] for row in rows
    ]
    new_tokens = []
    for start in range(0, len(prompts), batch_size):
        input_ids, attention_mask = pad_prompts(prompts[start : start + batch_size], tokenizer.pad_token_id)
        output = generate(model, input_ids, attention_mask, config)
        new_tokens += output.sequences[:, input_ids.shape[1] :].tolist()
    return new_tokens


def summarise(answers: list[list[int]], references: list[list[int]], eos_token_id: int) -> dict[str, float]:
    """Means over answers, and their standard errors under `<name>_error`.

    Args:
        answers: new tokens, each a whole canvas; an answer ends before its first EOS, or with the canvas.
        references: tokens of the right answers, without EOS.
        eos_token_id: the token that ends an answer.
    """
    cut = [answer[: answer.index(eos_token_id)] if eos_token_id in answer else answer for answer in answers]
    pairs = list(zip(cut, references, strict=True))
    columns = {
        "ended": [eos_token_id in answer for answer in answers],
        "length": [len(answer) for answer in cut],
        "same_length": [len(answer) == len(reference) for answer, reference in pairs],
        "exact": [answer == reference for answer, reference in pairs],
        "empty": [not answer for answer in cut],
    }
    summary = {}
    for name, values in columns.items():
        numbers = torch.tensor(values, dtype=torch.float64)
        summary[name] = float(numbers.mean())
        summary[f"{name}_error"] = float(numbers.std() / math.sqrt(len(numbers)))
    return summary


def percent(summary: dict[str, float], name: str) -> str:
    return f"{100 * summary[name]:.1f} ± {100 * summary[f'{name}_error']:.1f}"


def likelihood_table(results: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: what each policy's targets are and cost."""
    lines = [
        "| policy | rows a batch | targets an answer | EOS, % of targets | NELBO, nats per token | nats per answer |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        per_token, per_answer = (
            f"{result[name]:.3f} ± {result[f'{name}_error']:.3f}" for name in ("nats_per_token", "nats_per_answer")
        )
        lines.append(
            f"| `{result['policy']}` | {result['batch_size']} | {result['targets']:.1f} | "
            f"{100 * result['eos_share']:.0f} | {per_token} | {per_answer} |"
        )
    return lines


def canvas_table(results: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: the answers of each policy on each canvas."""
    lines = [
        "| policy | canvas / block | EOS last | ended, % | length | right length, % | exact match, % | empty, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        canvas = f"{result['max_new_tokens']} / {result['block_length']}"
        if result["max_new_tokens"] is None:
            canvas = "answer + 1"
        rates = " | ".join(percent(result, name) for name in ("same_length", "exact", "empty"))
        lines.append(
            f"| `{result['policy']}` | {canvas} | {'yes' if result['suppress_eos_confidence'] else 'no'} | "
            f"{percent(result, 'ended')} | {result['length']:.1f} ± {result['length_error']:.1f} | {rates} |"
        )
    return lines


def measure(
    policy: str, folder: Path, base: str, tokenizer: Any, rows: list[dict], canvases: tuple[Canvas, ...]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results of one policy: one entry per batch size, one per canvas."""
    model = load_model(base, adapter=str(folder)).eval()
    collator = make_collator(policy, tokenizer)
    references = [[label for label in row["labels"] if label != -100] for row in rows]
    likelihoods, answers = [], []
    for batch_size in LIKELIHOOD_BATCHES if policy == "pad_to_max" else LIKELIHOOD_BATCHES[:1]:
        measured = measure_likelihood(model, collator, rows, batch_size)
        likelihoods.append({"policy": policy, "batch_size": batch_size, **measured})
    for canvas in canvases:
        print(f"{policy}: {canvas}", file=sys.stderr, flush=True)
        summary = summarise(complete(model, tokenizer, rows, canvas), references, tokenizer.eos_token_id)
        answers.append({"policy": policy, **asdict(canvas), **summary})
    return likelihoods, answers


def main() -> None:
    arguments = parse_arguments()
    os.chdir(ROOT)
    if arguments.smoke:
        arguments.steps, arguments.num_prompts = 2, 4
    canvases = (CANVASES[0], CANVASES[4]) if arguments.smoke else CANVASES
    if not (DATA / "train.jsonl").is_file():
        print(f"Writing the word pairs to {DATA}", file=sys.stderr)
        write_pairs(DATA)
    recipe = yaml.safe_load(RECIPE.read_text())
    base = recipe["model_name_or_path"]
    tokenizer = load_tokenizer(base)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    files = []
    for part in recipe["datasets"]:
        path = arguments.output_dir / Path(part["path"]).name
        lines = Path(part["path"]).read_text().splitlines()[: 64 if arguments.smoke else None]
        write_jsonl(path, tokenise([json.loads(line) for line in lines], tokenizer))
        files.append({**part, "path": str(path)})
    pairs = [json.loads(line) for line in (DATA / "test.jsonl").read_text().splitlines()]
    pairs = sorted(pairs, key=lambda pair: hash_fraction(pair["prompt"]))[: arguments.num_prompts]
    rows = tokenise(pairs, tokenizer)

    likelihoods, answers = [], []
    for policy in EOS_POLICIES:
        folder = train(policy, files, arguments)
        measured = measure(policy, folder, base, tokenizer, rows, canvases)
        likelihoods += measured[0]
        answers += measured[1]
    lengths = torch.tensor([len(pair["completion"]) for pair in pairs], dtype=torch.float64)
    times = os.times()
    report = {
        "steps": arguments.steps,
        "seed": arguments.seed,
        "num_prompts": len(rows),
        "reference_length": {"mean": float(lengths.mean()), "min": int(lengths.min()), "max": int(lengths.max())},
        "likelihoods": likelihoods,
        "answers": answers,
        "cpu_seconds": times.user + times.system + times.children_user + times.children_system,
    }
    (arguments.output_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{len(rows)} held-out prompts, {arguments.steps} steps, seed {arguments.seed}.", end=" ")
    print(f"Right answers: {lengths.mean():.1f} tokens on average, {lengths.min():.0f} to {lengths.max():.0f}.\n")
    print("\n".join([*likelihood_table(likelihoods), "", *canvas_table(answers)]))
    print(
        f"\nAll figures: {arguments.output_dir / 'results.json'} ({report['cpu_seconds']:.0f} CPU seconds)",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
