"""Trainings whose writing is cut off for real: by a kill, a full disk, a limit on file sizes. Prints one JSON object.

Usage: interrupted_saves.py FOLDER. Where the process may mount, the disks are tmpfs; the tests beside it run it so.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from tests.tiny_models import SHORT_RUN, tiny_llada, tiny_tokenizer

ROWS = [{"prompt": f"row {i}: ", "completion": "abcdefghij"[: 1 + i % 7]} for i in range(24)]


class KilledTrainer(DiffusionTrainer):
    """Dies at step 4 when its weights are written and the state of the optimiser is not."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def make_trainer(folder: Path, trainer_class: type[DiffusionTrainer] = DiffusionTrainer, **settings: Any) -> Any:
    """A trainer of six steps that keeps one checkpoint, written every second step."""
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
    }
    config = DiffusionConfig(**(SHORT_RUN | arguments | {"save_strategy": "steps"} | settings))
    return trainer_class(tiny_llada(), config, Dataset.from_list(ROWS), processing_class=tiny_tokenizer())


def train_until_it_fails(folder: Path, limit: int = resource.RLIM_INFINITY) -> dict[str, Any]:
    """Save the untrained weights, train, save again, with at most `limit` bytes a file, and say what is left."""
    trainer = make_trainer(folder)
    trainer.save_model()
    weights, errors = (folder / "model.safetensors").read_bytes(), []
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for work in (trainer.train, trainer.save_model):
        try:
            work()
        except OSError as error:
            errors.append(str(error))
    return {
        "errors": errors,
        "names": sorted(path.name for path in folder.iterdir()),
        "step": trainer.state.global_step,
        "weights_intact": weights == (folder / "model.safetensors").read_bytes(),
    }


def in_a_fork(work: Callable[[], Any]) -> Any:
    """The result of `work` in a process of its own, or the negative number of the signal that ended it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with os.fdopen(write, "w") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(text) if status == 0 else status


def main() -> None:
    """Run all scenarios."""
    folder = Path(sys.argv[1])
    results = {"killed": in_a_fork(lambda: make_trainer(folder / "killed", KilledTrainer).train())}
    results["limit"] = in_a_fork(lambda: train_until_it_fails(folder / "limit", limit=100_000))
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=920k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        results["disk"] = in_a_fork(lambda: train_until_it_fails(disk))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
