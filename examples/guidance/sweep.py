"""Sample your prompts at several guidance scales, score the answers with your function, plot adherence and diversity.

    python examples/guidance/sweep.py --model_name_or_path CHECKPOINT --prompts_file prompts.txt \
        --score my_scores:adherence --scales 0 0.5 1 2 --output_dir outputs/sweep

`my_scores.py`, in the current folder or installed, defines

    def adherence(prompts: list[str], completions: list[str]) -> list[float]: ...

one number for each pair, more for a better fit: the probability that a classifier gives to what the prompt asked for,
a judge's grade, whether a constraint is met. The prompts are lines of text, or JSON lines with `prompt` (text, or
messages for a chat model; your function then gets the text of the last message).

Diversity is distinct-n: different n-grams over all n-grams of the answers at one scale (Li et al., arXiv 1510.03055).
It falls with the number of answers, so compare it at equal numbers only. Every scale has the same noise. Written:

    samples.jsonl   every prompt, scale, answer and score
    results.json    score and distinct-n at each scale with standard errors over prompts; cost; options
    sweep.svg       score against scale, and score against distinct-2
"""

import argparse
import importlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from guidance_scores import mean_and_error
from matplotlib import pyplot

from dlm_tune import DiffusionGenerationConfig, generate
from dlm_tune.commands.arguments import CheckpointArguments, GenerateArguments
from dlm_tune.commands.checkpoint import inference_device_map, load_checkpoint
from dlm_tune.commands.generate import read_prompts
from dlm_tune.generation import config_for_tokenizer, decode_completion, pad_prompts, tokenize_prompt

ScoreFunction = Callable[[list[str], list[str]], Sequence[float]]


def main() -> None:
    arguments = parse_arguments()
    score = load_score(arguments.score)
    prompts = read_prompts(GenerateArguments(prompts_file=str(arguments.prompts_file)))
    checkpoint = CheckpointArguments(arguments.model_name_or_path, use_cpu=arguments.use_cpu)
    model, tokenizer = load_checkpoint(
        checkpoint, adapter=arguments.adapter, device_map=inference_device_map(arguments.use_cpu)
    )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with (arguments.output_dir / "samples.jsonl").open("w", encoding="utf-8") as samples:
        for scale in arguments.scales:
            completions, cost = sample(model, tokenizer, prompts, scale, arguments)
            texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
            texts = [text for text in texts for _ in range(arguments.samples)]
            scores = checked_scores(score(texts, completions), len(texts), arguments.score)
            for row in zip(texts, completions, scores, strict=True):
                named = dict(zip(("prompt", "completion", "score"), row, strict=True))
                samples.write(json.dumps({"guidance_scale": scale, **named}, ensure_ascii=False) + "\n")
            groups = [completions[i : i + arguments.samples] for i in range(0, len(texts), arguments.samples)]
            results.append({"guidance_scale": scale, **figures(scores, groups, arguments.unit), **cost})
            print("  ".join(f"{name} {value:.4g}" for name, value in results[-1].items()), flush=True)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    content = {"arguments": options, "num_prompts": len(prompts), "results": results}
    (arguments.output_dir / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw(results, arguments.score, arguments.unit, arguments.output_dir / "sweep.svg")
    print(f"Written to {arguments.output_dir}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint: a folder or a Hub name")
    parser.add_argument("--adapter", help="LoRA adapter to put on the model")
    parser.add_argument("--prompts_file", type=Path, required=True, help=".txt, one a line, or .jsonl with `prompt`")
    parser.add_argument("--score", required=True, help="module:function, called with prompts and completions")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0], help="default 0 0.5 1 2")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt at each scale (default 1)")
    parser.add_argument("--unit", default="word", choices=["word", "character"], help="of distinct-n (default word)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1; 0 is greedy")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="default 64")
    parser.add_argument("--block_length", type=int, help="by default one block")
    parser.add_argument("--steps", type=int, help="denoising steps; by default one a token")
    parser.add_argument("--guidance_schedule", default="constant", help="constant (default), linear or interval")
    parser.add_argument("--guidance_interval", type=float, nargs=2, metavar=("START", "END"))
    parser.add_argument("--batch_size", type=int, default=32, help="answers that are denoised together (default 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--use_cpu", action="store_true", help="stay on the CPU where there is a GPU")
    arguments = parser.parse_args()
    for name in ("samples", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be 1 or more")
    return arguments


def load_score(name: str) -> ScoreFunction:
    """The function `module:function`; modules of the current folder are found too."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise SystemExit(f"--score {name} must be module:function, for example my_scores:adherence")
    sys.path.insert(0, os.getcwd())
    function = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(function):
        raise SystemExit(f"--score {name}: the module {module_name} has no function {function_name}")
    return function


def checked_scores(scores: Sequence[float], num_pairs: int, name: str) -> list[float]:
    """The scores as numbers, if there is a finite one for each pair."""
    numbers = [float(score) for score in scores]
    if len(numbers) != num_pairs or not all(map(math.isfinite, numbers)):
        raise SystemExit(f"{name} must return one finite number for each of {num_pairs} pairs, not {numbers[:5]} ...")
    return numbers


def sample(
    model: Any, tokenizer: Any, prompts: list[Any], scale: float, arguments: argparse.Namespace
) -> tuple[list[str], dict[str, float]]:
    """Answers, those to one prompt together, and what they cost."""
    guidance = {"guidance_schedule": arguments.guidance_schedule, "guidance_interval": arguments.guidance_interval}
    config = DiffusionGenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        block_length=arguments.block_length,
        steps=arguments.steps or arguments.max_new_tokens,
        temperature=arguments.temperature,
        # samples of the model's distribution, not of a sharpened one
        confidence_from="predictive",
        seed=arguments.seed,
        guidance_scale=scale,
        **(guidance if scale else {}),
    )
    config = config_for_tokenizer(config, tokenizer, model)
    rows = [tokenize_prompt(tokenizer, prompt) for prompt in prompts for _ in range(arguments.samples)]
    completions: list[str] = []
    passes, start = 0, time.perf_counter()
    for first in range(0, len(rows), arguments.batch_size):
        batch = rows[first : first + arguments.batch_size]
        input_ids, attention_mask = pad_prompts(batch, tokenizer.pad_token_id, model.device)
        keys = torch.arange(first, first + len(batch))
        output = generate(model, input_ids, attention_mask, config, row_keys=keys)
        passes += output.num_row_passes
        for row in output.sequences[:, input_ids.shape[1] :].tolist():
            completions.append(decode_completion(tokenizer, row, config.eos_token_ids or []))
    return completions, {"seconds": time.perf_counter() - start, "num_row_passes": passes}


def figures(scores: list[float], groups: Sequence[Sequence[str]], unit: str) -> dict[str, float]:
    """Mean score, distinct-1 and distinct-2 of the answers, grouped by prompt, with standard errors over prompts."""
    starts = range(0, len(scores), len(groups[0]))
    found = mean_and_error("score", [sum(scores[i : i + len(groups[0])]) / len(groups[0]) for i in starts])
    for n in (1, 2):
        value, error = distinct_and_error(groups, n, unit)
        found |= {f"distinct_{n}": value, f"distinct_{n}_error": error}
    return found


def distinct_and_error(groups: Sequence[Sequence[str]], n: int, unit: str) -> tuple[float, float]:
    """Distinct-n, NaN where no answer has n units, and its jackknife error: each group is left out in turn."""
    counts = [Counter(gram for text in group for gram in n_grams(text, n, unit)) for group in groups]
    total = sum(counts, Counter())
    values = []
    for count in counts:
        lost = sum(total[gram] == number for gram, number in count.items())
        values.append((len(total) - lost) / max(1, total.total() - count.total()))
    mean = sum(values) / len(values)
    error = math.sqrt((len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values))
    return (len(total) / total.total(), error) if total else (math.nan, math.nan)


def n_grams(text: str, n: int, unit: str) -> list[tuple[str, ...]]:
    units = text.split() if unit == "word" else list(text)
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]


def draw(results: list[dict[str, Any]], score_name: str, unit: str, path: Path) -> None:
    """Score against scale, and score against distinct-2 with the scale at each point; bars are standard errors."""
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "guidance", "font.size": 9})
    ordered = sorted(results, key=lambda row: row["guidance_scale"])
    columns = {name: [row[name] for row in ordered] for name in ordered[0]}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.4))
    style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "elinewidth": 0.8, "capsize": 2, "color": "#0072b2"}
    left.errorbar(columns["guidance_scale"], columns["score"], yerr=columns["score_error"], **style)
    left.set_xlabel("guidance scale w")
    left.set_ylabel(score_name)
    bars = {"xerr": columns["distinct_2_error"], "yerr": columns["score_error"]}
    right.errorbar(columns["distinct_2"], columns["score"], **bars, **style)
    for row in ordered:
        place = (row["distinct_2"], row["score"])
        right.annotate(f"w = {row['guidance_scale']:g}", place, textcoords="offset points", xytext=(5, 5), fontsize=7)
    right.set_xlabel(f"distinct-2 ({unit}s)")
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.5)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
