"""The tasks and arms of the guidance experiments, and the training of one arm.

The arms have the same rows a step and peak learning rate. All but `sft_half` and `distilled` have the same steps, and
differ in what the rows are:

    sft_only            pairs
    sft_half            pairs, for half of the steps: as many paired rows as `unsupervised` sees
    unsupervised        half pairs, half text without prompts: what unsupervised guidance needs
    standard            pairs, 10 % of their prompts masked: standard classifier-free guidance
    standard_unpaired   half text without prompts, and 10 % of the prompts of the others masked
    distilled           the unsupervised model, trained on pairs for a quarter of the steps to answer as if guided
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm_tune import DiffusionGenerationConfig

ARMS = ("sft_only", "sft_half", "unsupervised", "standard", "standard_unpaired", "distilled")
DROPOUT, UNPAIRED_FRACTION = 0.1, 0.5
JUDGE, JUDGE_SEED = "judge", 1000


@dataclass(frozen=True)
class Task:
    """What differs between the two tasks.

    Attributes:
        name: of folders and files.
        num_layers: of the model.
        sampling: how answers are drawn; the canvas is the recipe's `block_length`.
        num_samples: answers for each arm, seed and guidance scale.
        distillation_scale: guidance scale that `distilled` learns.
    """

    name: str
    num_layers: int
    sampling: DiffusionGenerationConfig
    num_samples: int
    distillation_scale: float

    @property
    def data(self) -> Path:
        """What the data scripts wrote."""
        return Path("data/guidance") / self.name

    @property
    def outputs(self) -> Path:
        """Of the trainings."""
        return Path("outputs/guidance") / self.name

    @property
    def recipe(self) -> Path:
        """Of one training."""
        return Path("recipes/guidance/sft") / f"{self.name}.yaml"


TASKS = {
    # one token a step in random order at temperature 1: samples of the model's own distribution
    "category": Task(
        "category",
        3,
        DiffusionGenerationConfig(max_new_tokens=12, steps=12, block_length=None, remasking="random", temperature=1.0),
        num_samples=500,
        distillation_scale=1.5,
    ),
    "g2p": Task(
        "g2p",
        4,
        DiffusionGenerationConfig(max_new_tokens=16, steps=16, block_length=None),
        num_samples=400,
        distillation_scale=1.0,
    ),
}


def arm_flags(task: Task, arm: str, seed: int, max_steps: int, distillation_scale: float) -> dict[str, Any]:
    """The keys in which a training differs from the task's recipe."""
    flags: dict[str, Any] = {
        "model_name_or_path": task.outputs / f"untrained-{seed}",
        "output_dir": task.outputs / f"{arm}-{seed}",
        "seed": seed,
        "noise_seed": seed,
        "max_steps": max_steps,
    }
    if arm == "sft_half":
        flags["max_steps"] = max(max_steps // 2, 1)
    if arm in ("unsupervised", "standard_unpaired"):
        flags |= {"unpaired_dataset": task.data / "unpaired.jsonl", "unpaired_fraction": UNPAIRED_FRACTION}
    if arm in ("standard", "standard_unpaired"):
        flags["prompt_dropout"] = DROPOUT
    if arm == "distilled":
        flags |= {
            "model_name_or_path": task.outputs / f"unsupervised-{seed}",
            "max_steps": max(max_steps // 4, 1),
            "learning_rate": 1e-3,
            "warmup_steps": 20,
            "guidance_distillation_scale": distillation_scale,
        }
    return flags


def train(verb: str, recipe: Path, flags: dict[str, Any]) -> None:
    """Run `dlm-tune` unless its folder says that it has finished; its output goes to a log beside the folder."""
    folder = Path(flags["output_dir"])
    record = folder.with_suffix(".json")
    if record.is_file():
        return
    arguments = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    command = ["dlm-tune", verb, "--config", str(recipe), *arguments, "--overwrite_output_dir", "true"]
    print("$", shlex.join(command), flush=True)
    start = time.perf_counter()
    with folder.with_suffix(".log").open("w") as log:
        finished = subprocess.run(
            [sys.executable, "-m", "dlm_tune", *command[1:]],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    if finished.returncode:
        tail = Path(log.name).read_text(errors="replace")[-2000:]
        raise SystemExit(f"{folder}: the training failed, its log {log.name} ends with\n{tail}")
    seconds = time.perf_counter() - start
    record.write_text(json.dumps({"command": shlex.join(command), "seconds": round(seconds, 1)}) + "\n")
    print(f"{folder}: {seconds:.0f} s", flush=True)
