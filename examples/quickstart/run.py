"""`make quickstart`: fine-tune a small diffusion language model on English inflection, and compare before and after.

    python examples/quickstart/run.py
    python examples/quickstart/run.py --seed 1 --output_dir outputs/quickstart-seed1
    python examples/quickstart/run.py --config recipes/quickstart/sft/from_scratch.yaml   # no pretrained base

Trains with `dlm-tune sft`, which also measures the held-out likelihood bound before and after, then completes held-out
prompts with both models. The report lies in OUTPUT_DIR/report.json. To test the plumbing only: --smoke.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from inflection_data import DEFAULT_OUTPUT_DIR as DATA
from inflection_data import write_jsonl, write_pairs
from rich.console import Console
from rich.table import Table
from scoring import KINDS, Scores, choose_rows, kind_of, rule_answer, score

from dlm_tune import DiffusionGenerationConfig, __version__, load_model, load_tokenizer
from dlm_tune.evaluation.completions import evaluate_completions

ROOT = Path(__file__).resolve().parents[2]
NUM_RULE_OK = 400
NUM_SAMPLES = 4  # shown of each kind
CANVAS = DiffusionGenerationConfig(max_new_tokens=18, block_length=18, steps=18)  # the recipe's block_length


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/quickstart/sft/lora.yaml", help="recipe of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's initial weights, row order and noise")
    parser.add_argument("--max_steps", type=int, help="instead of the recipe's")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--split", choices=["test", "development"], default="test", help="tune on development")
    parser.add_argument(
        "--all_pairs", action="store_true", help=f"complete all pairs, not {NUM_RULE_OK} rule-right ones"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps and a few pairs")
    return parser.parse_args()


def train(arguments: argparse.Namespace, model_dir: Path, eval_file: Path) -> dict[str, Any]:
    """Run `dlm-tune sft` as a user would, and return what it measured: results.json, and the seconds it took."""
    overrides = {
        "output_dir": model_dir,
        "eval_dataset_name": eval_file,
        "seed": arguments.seed,
        "noise_seed": arguments.seed,
        "max_steps": 4 if arguments.smoke else arguments.max_steps,
        "eval_noise_samples": 2 if arguments.smoke else None,
    }
    flags = [part for key, value in overrides.items() if value is not None for part in (f"--{key}", str(value))]
    command = ["sft", "--config", arguments.config, *flags, "--overwrite_output_dir", "true"]
    print("$ dlm-tune", *command, flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dlm_tune", *command], check=True)
    return {"seconds": time.perf_counter() - start, **json.loads((model_dir / "results.json").read_text())}


def percent(scores: Scores, kind: str, error: bool = True) -> str:
    text = f"{100 * scores.exact_match[kind]:.1f} %"
    return f"{text} ± {100 * scores.standard_error[kind]:.1f}" if error else text


def print_scores(
    console: Console, scores: dict[str, Scores], results: dict[str, Any], num_pairs: dict[str, int]
) -> None:
    table = Table(title="English inflection of held-out words", title_justify="left")
    table.add_column("")
    for column in ("spelling rule", "before", "after"):
        table.add_column(column, justify="right")
    before_after = [results["before"], results["after"]]
    nelbo = [f"{part['eval_nelbo']:.3f} ± {part['eval_nelbo_standard_error']:.3f}" for part in before_after]
    table.add_row("NELBO, nats per token", "-", *nelbo)
    for kind, label in (
        ("rule_fails", f"exact match, rule wrong ({num_pairs['rule_fails']})"),
        ("rule_ok", f"exact match, rule right ({num_pairs['rule_ok']})"),
        ("all", "exact match, all pairs"),
    ):
        table.add_row(label, *(percent(part, kind, error=which != "rule") for which, part in scores.items()))
    errors = (f"{100 * part.character_error_rate:.1f} %" for part in scores.values())
    table.add_row("character error rate", *errors)
    table.caption = '± one standard error; NELBO and error rate: lower is better; "all" weighs both kinds of pair'
    console.print(table)


def print_comparison(console: Console, scores: dict[str, Scores]) -> None:
    """Say in words how the model stands against four lines of spelling rule."""
    rule, after = scores["rule"], scores["after"]
    difference = after.exact_match["all"] - rule.exact_match["all"]
    if abs(difference) <= 2 * after.standard_error["all"]:
        verdict = "no better than"
    else:
        verdict = "better than" if difference > 0 else "below"
    console.print(
        f"Over all pairs the model ({percent(after, 'all')}) is {verdict} the four-line spelling rule "
        f"({percent(rule, 'all', error=False)}). What it has learned beyond the rule shows where the rule is wrong: "
        f"{percent(after, 'rule_fails')}, where the rule has none."
    )


def print_samples(console: Console, rows: list[dict], answers: dict[str, list[str]]) -> None:
    table = Table(title="Samples", title_justify="left")
    for column in ("prompt", "expected", "spelling rule", "before", "after"):
        table.add_column(column, no_wrap=column == "prompt")
    for kind in KINDS:
        for i in [i for i, row in enumerate(rows) if kind_of(row) == kind][:NUM_SAMPLES]:
            given = (answers[which][i] for which in ("rule", "before", "after"))
            table.add_row(rows[i]["prompt"], rows[i]["completion"], *(repr(answer)[1:-1] for answer in given))
    console.print(table)


def print_next_steps(console: Console, model_dir: Path, is_adapter: bool) -> None:
    console.print(f"\nThe {'adapter' if is_adapter else 'model'} lies in {model_dir}. Go on with", highlight=False)
    commands = (
        f"dlm-tune generate --model_name_or_path {model_dir} --prompt 'past of blog: ' "
        f"--max_new_tokens {CANVAS.max_new_tokens} --block_length {CANVAS.block_length} --steps {CANVAS.steps}",
        f"hf upload YOUR_NAME/inflection-lora {model_dir}",
    )
    for command in commands:
        console.print(f"  {Path(sys.executable).parent}/{command}", highlight=False, soft_wrap=True)


def main() -> None:
    arguments = parse_arguments()
    os.chdir(ROOT)
    console = Console()
    if not (DATA / "train.jsonl").is_file():
        console.print(f"Writing the word pairs to {DATA}")
        write_pairs(DATA)
    recipe = yaml.safe_load(Path(arguments.config).read_text())
    model_dir = arguments.output_dir / ("adapter" if recipe.get("use_peft") else "model")
    population = [json.loads(line) for line in (DATA / f"{arguments.split}.jsonl").read_text().splitlines()]
    rows = choose_rows(population, 8 if arguments.smoke else None, 8 if arguments.smoke else NUM_RULE_OK)
    if arguments.all_pairs:
        rows = choose_rows(population, None, None)

    eval_file = DATA / f"{arguments.split}.jsonl"
    if arguments.smoke:
        eval_file = arguments.output_dir / "smoke.jsonl"
        write_jsonl(eval_file, rows)
    results = train(arguments, model_dir, eval_file)

    base = recipe["model_name_or_path"]
    after = load_model(base, adapter=str(model_dir)) if recipe.get("use_peft") else load_model(str(model_dir))
    answers = {"rule": [rule_answer(row["prompt"]) for row in rows]}
    for which, model in (("before", load_model(base)), ("after", after)):
        console.print(f"Completing {len(rows)} held-out prompts with the model {which} training")
        completed = evaluate_completions(model, load_tokenizer(base), rows, CANVAS)
        answers[which] = [answer for _, _, answer in completed.samples]
    scores = {which: score(rows, given, population) for which, given in answers.items()}
    num_pairs = {kind: sum(kind_of(row) == kind for row in rows) for kind in KINDS}

    print_samples(console, rows, answers)
    print_scores(console, scores, results, num_pairs)
    print_comparison(console, scores)
    print_next_steps(console, model_dir, bool(recipe.get("use_peft")))
    report = {
        "recipe": arguments.config,
        "seed": arguments.seed,
        "split": arguments.split,
        "num_pairs": {"all": len(population), **num_pairs},
        "nelbo": {when: results[when] for when in ("before", "after")},
        "scores": {which: asdict(part) for which, part in scores.items()},
        "training_command_seconds": results["seconds"],
        "num_threads": torch.get_num_threads(),
        "versions": {"dlm_tune": __version__, "torch": torch.__version__},
    }
    (arguments.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"All figures: {arguments.output_dir / 'report.json'}", highlight=False)


if __name__ == "__main__":
    main()
