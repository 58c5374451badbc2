"""What transformers' Trainer does with checkpoints: resume and load-best read files in the original names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.models.layouts import saved_keys
from tests.tiny_models import tiny_dream, tiny_llada


class ScoringTrainer(Trainer):
    """Trains on the sum of all tokens' negative log-likelihoods."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        tokens = inputs["input_ids"]
        outputs = model(input_ids=tokens, target_ids=tokens, target_mask=tokens > 60)
        loss = outputs.token_nll.mean()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None


def make_trainer(build: Any, directory: Path, **arguments: Any) -> ScoringTrainer:
    generator = torch.Generator().manual_seed(3)
    rows = [{"input_ids": row} for row in torch.randint(3, 120, (32, 8), generator=generator)]
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    return ScoringTrainer(build(), TrainingArguments(**(settings | arguments)), train_dataset=rows, eval_dataset=rows)


def losses(trainer: ScoringTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("build", [tiny_llada, tiny_dream])
def test_resumed_run_equals_the_uninterrupted_one(build: Any, tmp_path: Path) -> None:
    whole = make_trainer(build, tmp_path / "whole")
    whole.train()
    resumed = make_trainer(build, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    if build is tiny_llada:
        assert "model.transformer.wte.weight" in saved_keys(tmp_path / "whole" / "checkpoint-2")


@pytest.mark.parametrize("build", [tiny_llada, tiny_dream])
def test_best_checkpoint_is_loaded_at_the_end(build: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        build,
        tmp_path,
        max_steps=4,
        learning_rate=0.05,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first checkpoint is the one to find
        save_total_limit=2,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[0] > evaluated[1] + 0.01
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[0], abs=1e-6)
