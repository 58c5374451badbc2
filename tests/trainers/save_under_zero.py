"""Run by test_zero_saving.py in two processes: trains under ZeRO, saves, goes on from a checkpoint, saves again.

Usage: save_under_zero.py FOLDER STAGE
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from tests.tiny_models import SHORT_RUN, tiny_llada, tiny_tokenizer

ROWS = [{"prompt": f"row {i}: ", "completion": "abcdefghij"[: 1 + i % 7]} for i in range(24)]


class KeepFirst(TrainerCallback):
    """Copies the checkpoint of step 2, which is removed after the next one."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir)
        if state.is_world_process_zero and state.global_step == 2:
            shutil.copytree(folder / "checkpoint-2", folder.parent / "kept")


def make_trainer(folder: Path, stage: int, kind: str) -> DiffusionTrainer:
    """A trainer of four steps with a checkpoint after every second one, of which the last is kept."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "nelbo",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "deepspeed": {
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "steps_per_print": 1000000,
        },
    }
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if kind == "lora" else None
    arguments = DiffusionConfig(**(SHORT_RUN | settings))
    rows = Dataset.from_list(ROWS)
    return DiffusionTrainer(
        tiny_llada(), arguments, rows, rows, processing_class=tiny_tokenizer(), peft_config=adapter
    )


def main() -> None:
    folder, stage = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    for kind in ("full", "lora"):
        train_and_go_on(folder / kind, stage, kind)
    torch.distributed.destroy_process_group()


def train_and_go_on(folder: Path, stage: int, kind: str) -> None:
    """Train, save, and train again from the copy of the first checkpoint."""
    whole = make_trainer(folder / "whole", stage, kind)
    whole.add_callback(KeepFirst())
    whole.train()
    whole.save_model()
    resumed = make_trainer(folder / "resumed", stage, kind)
    resumed.train(resume_from_checkpoint=str(folder / "kept"))
    resumed.save_model()
    if whole.accelerator.process_index == 0:
        logs = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
        (folder / "losses.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main()
