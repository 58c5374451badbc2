"""Run by test_zero3.py in two processes: scores with unequal numbers of targets per rank under ZeRO-3."""

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from dlm_tune.models import lm_head
from tests.tiny_models import tiny_llada


class UnevenTrainer(Trainer):
    """Rank 0 scores every position of its row, rank 1 none; with weights in the first step, without in the second."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        tokens = inputs["input_ids"]
        mask = torch.full_like(tokens, self.args.process_index == 0, dtype=torch.bool)
        assert hasattr(model.get_output_embeddings().weight, "ds_id"), "the head must be partitioned"
        scored = {"input_ids": tokens, "target_ids": tokens, "target_mask": mask}
        if self.state.global_step:
            return model(**scored).token_nll.sum()
        return model(**scored, target_weights=torch.ones(tokens.shape)).loss


def row() -> torch.Tensor:
    return torch.randint(3, 120, (8,), generator=torch.Generator().manual_seed(3))


def main() -> None:
    lm_head.MAX_CHUNK_LOGITS = 3 * 128
    arguments = TrainingArguments(
        output_dir=sys.argv[1],
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        deepspeed={
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
        },
    )
    trainer = UnevenTrainer(tiny_llada().train(), arguments, train_dataset=[{"input_ids": row()}] * 4)
    trainer.train()
    if int(os.environ["RANK"]) == 0:
        print("LOSSES", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
