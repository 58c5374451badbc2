"""Train and score every arm of the guidance experiments (see guidance_arms.py).

Resumable: trainings that are finished are skipped, and so are figures that are in results/<task>.jsonl already, which
has one JSON line for each arm, seed and guidance scale.

    python examples/guidance/category_data.py --wordnet package/dict
    python examples/guidance/run.py --task category --jobs 2
    python examples/guidance/g2p_few_data.py
    python examples/guidance/run.py --task g2p --jobs 2
    python examples/guidance/plot.py

A seed decides initial weights, order of the rows and noise.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from guidance_arms import ARMS, JUDGE, JUDGE_SEED, TASKS, Task, arm_flags, train
from guidance_checkpoint import BOS, UNKNOWN, write_checkpoint
from guidance_scores import CategoryClassifier, branch_nelbo, category_scores, phoneme_scores, read_lines

from dlm_tune import DiffusionGenerationConfig, load_model, load_tokenizer
from dlm_tune.evaluation.completions import evaluate_completions

ROOT = Path(__file__).resolve().parents[2]
GUIDANCE_SCALES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scales", nargs="+", type=float, default=list(GUIDANCE_SCALES))
    parser.add_argument("--stage", choices=["train", "score", "all"], default="all")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each on one thread")
    parser.add_argument("--num_samples", type=int, help="answers for each arm, seed and scale, instead of the task's")
    parser.add_argument("--max_steps", type=int, help="of each training, instead of the recipe's")
    parser.add_argument("--distillation_scale", type=float, help="guidance scale of the arm `distilled`")
    parser.add_argument("--results_dir", type=Path, default=ROOT / "examples/guidance/results")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of data/, recipes/ and outputs/")
    return parser.parse_args()


def train_all(task: Task, arguments: argparse.Namespace) -> None:
    """Write the untrained models, train the judge of fluency and all arms; `distilled` after the others."""
    recipe = yaml.safe_load(task.recipe.read_text())
    max_steps = arguments.max_steps or recipe["max_steps"]
    scale = distillation_scale(task, arguments)
    starts = {seed: f"untrained-{seed}" for seed in arguments.seeds}
    if task.name == "category":
        starts[JUDGE_SEED] = f"untrained-{JUDGE}"
    for seed, name in starts.items():
        if not (task.outputs / name / "model.safetensors").is_file():
            write_checkpoint(task.data / "vocabulary.txt", task.outputs / name, task.num_layers, seed)
    work = [
        ("sft", task.recipe, arm_flags(task, arm, seed, max_steps, scale))
        for arm in arguments.arms
        for seed in arguments.seeds
    ]
    if task.name == "category":
        judge = {"output_dir": task.outputs / JUDGE} | ({"max_steps": max_steps} if arguments.max_steps else {})
        work.insert(0, ("pretrain", Path("recipes/guidance/pretrain/judge.yaml"), judge))
    for is_distilled in (False, True):
        with ThreadPoolExecutor(arguments.jobs) as pool:
            part = [job for job in work if ("guidance_distillation_scale" in job[2]) == is_distilled]
            list(pool.map(lambda job: train(*job), part))


def distillation_scale(task: Task, arguments: argparse.Namespace) -> float:
    return task.distillation_scale if arguments.distillation_scale is None else arguments.distillation_scale


class Scorer:
    """Prompts of a task and the judges of its answers."""

    def __init__(self, task: Task, num_samples: int) -> None:
        """Read the data and train or load the judges."""
        self.task = task
        if task.name == "category":
            real = read_lines(task.data / "real_test.jsonl")
            categories = sorted({row["category"] for row in real})
            self.classifier = CategoryClassifier(read_lines(task.data / "classifier.jsonl"))
            self.judge = load_model(str(task.outputs / JUDGE)).eval()
            self.judge_tokenizer = load_tokenizer(str(task.outputs / JUDGE))
            self.wanted = [categories[i * len(categories) // num_samples] for i in range(num_samples)]
            self.rows = [{"prompt": f"{category} :", "completion": " -"} for category in self.wanted]
            self.real = real
            self.pairs = [
                {"prompt": f"{row['category']} :", "completion": f" {row['text']}"}
                for row in real[:: max(1, len(real) // num_samples)][:num_samples]
            ]
        else:
            self.rows = read_lines(task.data / "test.jsonl")[:num_samples]
            self.pairs = self.rows

    def score(self, texts: list[str]) -> dict[str, float]:
        """The figures of the answers to `rows`."""
        if self.task.name == "g2p":
            return phoneme_scores(texts, [row["references"] for row in self.rows])
        return self._category_scores(texts, self.wanted)

    def score_branches(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Held-out NELBO of the two branches of guidance, nats per word."""
        canvas = self.task.sampling.max_new_tokens
        return {
            **branch_nelbo("nelbo_cond", model, tokenizer, self.pairs, canvas, hide_prompts=False),
            **branch_nelbo("nelbo_uncond", model, tokenizer, self.pairs, canvas, hide_prompts=True),
        }

    def score_real(self) -> dict[str, dict[str, float]]:
        """The figures of held-out real glosses, as many as there are answers; and of those without unknown words."""
        if self.task.name == "g2p":
            return {}
        whole = [row for row in self.real if UNKNOWN not in row["text"].split()]
        figures = {}
        for name, real in {"real": self.real, "real_known_words": whole}.items():
            chosen = real[:: max(1, len(real) // len(self.rows))][: len(self.rows)]
            scores = self._category_scores([row["text"] for row in chosen], [row["category"] for row in chosen])
            figures[name] = {"n": len(chosen), **scores}
        return figures

    def _category_scores(self, texts: list[str], categories: list[str]) -> dict[str, float]:
        canvas = self.task.sampling.max_new_tokens
        cut = [" ".join(text.split()[: canvas - 1]) for text in texts]  # as long as a real gloss may be
        return category_scores(cut, categories, self.classifier, self.judge, self.judge_tokenizer, canvas)


def sample(task: Task, model: Any, tokenizer: Any, rows: list[dict], scale: float) -> tuple[list[str], dict[str, Any]]:
    """Answers to `rows` with guidance, and what they cost."""
    options = {"suppress_tokens": tokenizer.convert_tokens_to_ids([UNKNOWN, BOS, ":"])}
    if scale:
        options["guidance_scale"] = scale
    config = DiffusionGenerationConfig(**{**vars(task.sampling), **options})
    start, cpu_start = time.perf_counter(), time.process_time()
    completed = evaluate_completions(model, tokenizer, rows, config, batch_size=250, show_progress=False)
    cost = {
        "sampling_seconds": round(time.perf_counter() - start, 2),
        "sampling_cpu_seconds": round(
            time.process_time() - cpu_start, 2
        ),  # what other work on the machine leaves alone
        "forward_passes": completed.num_forward_passes,
    }
    return [answer for _, _, answer in completed.samples], cost


def score_all(task: Task, arguments: argparse.Namespace) -> None:
    """Sample and score what the results lack."""
    path = arguments.results_dir / f"{task.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(task, arguments.num_samples or task.num_samples)
    if task.name == "category" and not any(row["arm"] == "real" for row in read_lines(path)):
        for name, figures in scorer.score_real().items():
            append(path, {"task": task.name, "arm": name, **figures})
    for arm in arguments.arms:
        for seed in arguments.seeds:
            folder = task.outputs / f"{arm}-{seed}"
            known = {(row["arm"], row.get("seed"), row.get("guidance_scale")) for row in read_lines(path)}
            missing = [scale for scale in arguments.scales if (arm, seed, scale) not in known]
            needs_branches = (f"branches of {arm}", seed, None) not in known
            if not (missing or needs_branches) or not folder.with_suffix(".json").is_file():
                continue
            training = json.loads(folder.with_suffix(".json").read_text())
            model, tokenizer = load_model(str(folder)).eval(), load_tokenizer(str(folder))
            if needs_branches:
                key = {"task": task.name, "arm": f"branches of {arm}", "seed": seed, "n": len(scorer.pairs)}
                append(path, {**key, **scorer.score_branches(model, tokenizer)})
            for scale in missing:
                texts, cost = sample(task, model, tokenizer, scorer.rows, scale)
                key = {"task": task.name, "arm": arm, "seed": seed, "guidance_scale": scale, "n": len(texts)}
                command = {
                    "training_seconds": training["seconds"],
                    "training_command": training["command"],
                    "command": sampling_command(task, arm, seed, scale),
                }
                append(path, {**key, **scorer.score(texts), **cost, **command, "samples": texts[:: len(texts) // 5]})


def sampling_command(task: Task, arm: str, seed: int, scale: float) -> str:
    """What makes this line of the results, given the training."""
    flags = f"--task {task.name} --stage score --arms {arm} --seeds {seed} --scales {scale}"
    return f"python examples/guidance/run.py {flags}"


def append(path: Path, row: dict[str, Any]) -> None:
    rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(rounded) + "\n")
    shown = {
        key: value for key, value in rounded.items() if not key.startswith(("training", "samples", "task", "command"))
    }
    print(" ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


def main() -> None:
    arguments = parse_arguments()
    arguments.results_dir = arguments.results_dir.resolve()
    os.chdir(arguments.root)
    torch.set_num_threads(1)
    task = TASKS[arguments.task]
    if not (task.data / "vocabulary.txt").is_file():
        raise SystemExit(f"{task.data} is empty: run the script that writes the data first (see --help)")
    if arguments.stage in ("train", "all"):
        train_all(task, arguments)
    if arguments.stage in ("score", "all"):
        score_all(task, arguments)


if __name__ == "__main__":
    main()
