"""Train a tiny model for a few steps and write what the trainer saw; run under torchrun by the tests beside it.

Usage: train_tiny.py OUTPUT_DIR PER_DEVICE_BATCH_SIZE ACCUMULATION_STEPS VARIANT
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM

from dlm_tune.commands.launch import leave
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from tests.models.test_mixin import tiny_decoder
from tests.tiny_models import SHORT_RUN, tiny_llada, tiny_tokenizer

ROWS = [{"prompt": f"row {i}: ", "completion": "abcdefghij"[: 1 + i % 7]} for i in range(24)]
PACKED_ROWS = [{"prompt": f"{i}: ", "completion": "abcdefghij"[: 1 + i % 7]} for i in range(82)]  # 24 sequences of 32

TEXTS = [{"text": "klmnopqrst"[: 1 + i % 9]} for i in range(5)]  # 8 of 32 rows in an epoch


VARIANTS = {
    "padded": {"save_strategy": "steps", "save_steps": 5},
    "packed": {"attention_annealing_steps": 4},  # and two steps without
    "unpaired": {"unpaired_fraction": 0.25, "prompt_dropout": 0.2, "prompt_noising": 0.2},
    "distilled": {"guidance_distillation_scale": 1.5, "prompt_dropout": 0.2},
    "distilled_adapter": {"guidance_distillation_scale": 1.5},
}
ADAPTER = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")


class RecordingTrainer(DiffusionTrainer):
    """Keeps the masked positions of every row at every step."""

    noise: dict[str, list[int]] = {}

    def corrupt_batches(self, batches, step, epoch):
        """Record what the parent draws."""
        super().corrupt_batches(batches, step, epoch)
        for batch in batches:
            for row, index in enumerate(batch["row_index"].tolist()):
                self.noise[f"{step}/{index}"] = batch["noisy"].masked[row].nonzero()[:, 0].tolist()


def main() -> None:
    output_dir, batch_size, accumulation = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    variant = sys.argv[4]
    packing, unpaired = variant == "packed", variant == "unpaired"
    parts = VARIANTS[variant]
    torch.set_num_threads(1)
    arguments = DiffusionConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        max_steps=5,
        eos_policy="one",
        packing=packing,
        max_length=32,
        **(SHORT_RUN | parts),
    )
    trainer = RecordingTrainer(
        model=tiny_decoder(Qwen3Config, Qwen3ForCausalLM, True) if packing else tiny_llada(),
        args=arguments,
        train_dataset=Dataset.from_list(PACKED_ROWS if packing else ROWS),
        unpaired_dataset=Dataset.from_list(TEXTS) if unpaired else None,
        eval_dataset=Dataset.from_list(ROWS[:7]),
        processing_class=tiny_tokenizer(),
        peft_config=ADAPTER if variant == "distilled_adapter" else None,
    )
    trainer.evaluate()  # as `dlm-tune sft` does, which must leave the processes together
    trainer.train()
    metrics = trainer.evaluate()
    rank = trainer.accelerator.process_index
    result = {
        "num_processes": trainer.accelerator.num_processes,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "metrics": {key: value for key, value in metrics.items() if "second" not in key and "time" not in key},
        "noise": trainer.noise,
    }
    (output_dir / f"rank{rank}.json").write_text(json.dumps(result))
    trainer.accelerator.end_training()
    leave(0)


if __name__ == "__main__":
    main()
