"""Run by test_distillation_parallel.py under torchrun: an adapter distilled from the model without it.

Usage, and what it prints:
    distil_in_two_processes.py wrappings WRAPPING ...        the largest difference of a gradient to one process,
                                                             relative to the largest entry of that gradient
    distil_in_two_processes.py zero STAGE adapter|full DIR   the losses of a run
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dlm_tune.commands.launch import leave
from dlm_tune.models import lm_head
from dlm_tune.trainers import DiffusionConfig, DiffusionTrainer
from dlm_tune.trainers.distillation import GuidedTeacher
from tests.models.score_in_two_processes import rows, target_mask
from tests.tiny_models import MASK_ID, SHORT_RUN, tiny_llada, tiny_tokenizer
from tests.trainers.train_tiny import ADAPTER, ROWS


def build() -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_llada(), lora).train()


def teacher_of(model: Any) -> GuidedTeacher:
    return GuidedTeacher(model, Accelerator(cpu=True), guidance_scale=1.5, mask_token_id=MASK_ID)


def leave_the_start(model: nn.Module) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def loss_of(model: nn.Module, teacher: GuidedTeacher, rank: int, step: int) -> Tensor:
    tokens, weights = rows(rank)
    mask = target_mask(rank, step)
    prompt = ~mask
    prompt[:, 4:8] = False
    arguments = {
        "input_ids": tokens.masked_fill(mask, MASK_ID),
        "attention_mask": torch.ones_like(tokens),
        "target_ids": tokens,
        "target_mask": mask,
        "target_weights": weights,
    }
    return model(guided_targets=teacher.guided_targets(model, arguments, prompt), **arguments).loss


def one_process() -> dict[str, Tensor]:
    model = build()
    teacher = teacher_of(model)
    leave_the_start(model)
    for step in range(2):
        for rank in range(2):
            (loss_of(model, teacher, rank, step) / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def wrap(model: Any, wrapping: str) -> nn.Module:
    if wrapping == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    if wrapping != "fsdp2_root":
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
    # accelerate's configuration frees the root's weights too
    fully_shard(model, mesh=mesh, **({"reshard_after_forward": True} if wrapping == "fsdp2_resharded" else {}))
    return model


def largest_difference(wrapping: str) -> float:
    model = build()
    teacher = teacher_of(model)
    leave_the_start(model)
    wrapped = wrap(model, wrapping)
    for step in range(2):
        loss_of(wrapped, teacher, dist.get_rank(), step).backward()
    differences = []
    for name, expected in one_process().items():
        gradient = dict(model.named_parameters())[name].grad
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        differences.append(float((full - expected).abs().max() / expected.abs().max()))
    assert len(differences) == 6
    return max(differences)


def train_under_zero(stage: int, kind: str, folder: str) -> list[float]:
    """Losses of three steps of 8 rows; stage 0 is a single process without DeepSpeed."""
    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }
    arguments = DiffusionConfig(
        output_dir=folder,
        deepspeed=config if stage else None,
        per_device_train_batch_size=4 if stage else 8,
        guidance_distillation_scale=1.5,
        learning_rate=1e-2,
        optim="sgd",
        max_steps=3,
        eos_policy="one",
        **SHORT_RUN,
    )
    trainer = DiffusionTrainer(
        tiny_llada(),
        arguments,
        Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        peft_config=ADAPTER if kind == "adapter" else None,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "zero":
        result: Any = train_under_zero(int(sys.argv[2]), *sys.argv[3:])
    else:
        lm_head.MAX_CHUNK_LOGITS = 4 * 128
        dist.init_process_group("gloo")
        result = {wrapping: largest_difference(wrapping) for wrapping in sys.argv[2:]}
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("RESULT", json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
