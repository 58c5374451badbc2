"""The frozen teacher of distilled guidance: the model as it was when training began."""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dlm_tune.diffusion import mask_prompt
from dlm_tune.models.distillation import GuidedTargets

# what peft calls the parameters that `disable_adapter` leaves out
_ADAPTER_NAMES = ("lora_", "modules_to_save", "trainable_tokens_")


def make_teacher(trainer: Any) -> "GuidedTeacher | None":
    """The teacher of a `DiffusionTrainer` whose model is in place, where its arguments ask for one."""
    scale = trainer.args.guidance_distillation_scale
    if scale is None:
        return None
    trainer.model.config.guidance_distillation_scale = scale
    return GuidedTeacher(
        trainer.model,
        trainer.accelerator,
        guidance_scale=scale,
        mask_token_id=trainer.mask_token_id,
        keep_token_ids=trainer.guidance_keep_token_ids,
        num_devices=trainer.args.n_gpu,
    )


class GuidedTeacher:
    """Says what guidance would sample at masked positions, before any training (see `models.distillation`).

    With an adapter the teacher is the model without it, which takes no further memory; else it is a frozen copy of the
    weights. Resuming a run does not change it: checkpoints are loaded into the student only.

    Args:
        model: the student before its first step, adapter included.
        accelerator: of the trainer.
        guidance_scale: w.
        mask_token_id: id of the mask token.
        keep_token_ids: prompt tokens that stay visible in the unconditional branch.
        num_devices: accelerators that this process trains on.

    Raises:
        ValueError: a model that cannot be its own teacher, or parallelism that cannot hold a second one.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Accelerator,
        *,
        guidance_scale: float,
        mask_token_id: int,
        keep_token_ids: Collection[int] = (),
        num_devices: int = 1,
    ) -> None:
        self._settings = (guidance_scale, mask_token_id, keep_token_ids)
        self._accelerator = accelerator
        self._adapted = model if isinstance(model, PeftModel) else None
        if num_devices > 1:
            raise ValueError(
                f"guidance_distillation_scale={guidance_scale} does not run on {num_devices} devices in one process. "
                "Start one process a device: `dlm-tune sft --accelerate_config multi_gpu`, or `accelerate launch`."
            )
        if self._adapted is not None:
            _check_adapter(self._adapted)
            return
        if accelerator.distributed_type == DistributedType.FSDP or is_deepspeed_zero3_enabled():
            raise ValueError(
                f"guidance_distillation_scale={guidance_scale} trains all weights against a second, frozen model, "
                "which FSDP and ZeRO-3 would not shard. Train an adapter (use_peft: true), whose teacher is the same "
                "model without it, or use data parallelism or ZeRO-2."
            )
        self._copy = copy.deepcopy(model).requires_grad_(False).eval().to(accelerator.device)

    def guided_targets(self, model: nn.Module, scores: dict[str, Tensor], prompt_mask: Tensor) -> GuidedTargets:
        """Return what the teacher says of the masked tokens of a microbatch.

        Args:
            model: the student as it is called in training.
            scores: what it is called with; see `model_inputs.masked_token_inputs`.
            prompt_mask: (B, L) bool, the tokens of the condition. Where all of them are masked already, both branches
                are the same.
        """
        guidance_scale, mask_token_id, keep_token_ids = self._settings
        noisy = scores["input_ids"]
        hidden_prompts = mask_prompt(noisy, prompt_mask, mask_token_id, keep_token_ids)
        both = {name: scores[name].repeat(2, 1) for name in ("attention_mask", "document_ids") if name in scores}
        with torch.no_grad(), self._accelerator.autocast(), self._frozen(model) as teacher:
            states = teacher(
                input_ids=torch.cat([noisy, hidden_prompts]),
                position_mask=scores["target_mask"].repeat(2, 1),
                wants_hidden=True,
                **both,
            ).last_hidden_state
        num_tokens = len(states) // 2
        head = None if self._adapted is not None else self._copy.get_output_embeddings()
        return GuidedTargets(states[:num_tokens], states[num_tokens:], guidance_scale, head)

    @contextmanager
    def _frozen(self, model: nn.Module) -> Iterator[Any]:
        if self._adapted is None:
            yield self._copy
            return
        was_training = model.training
        trained = [parameter for parameter in self._adapted.parameters() if parameter.requires_grad]
        model.eval()
        try:
            with self._adapted.disable_adapter():
                yield model
        finally:
            model.train(was_training)
            # peft freezes what is registered when it disables adapters; FSDP2 has registered others by the end
            for parameter in trained:
                parameter.requires_grad_(True)


def _check_adapter(model: PeftModel) -> None:
    """Refuse an adapter without which the model is not the one that training begins with."""
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in _ADAPTER_NAMES)
    ]
    if others:
        raise ValueError(
            f"guidance_distillation_scale takes the model without its adapter for the teacher, but {others[0]} "
            f"({len(others)} parameters in all) is trained outside of a LoRA adapter. Use LoRA with bias='none' and "
            "no other trainable weights, or train without an adapter."
        )
    changing = [name for name, module in model.named_modules() if isinstance(module, LoraLayer) and _changes(module)]
    if changing:
        raise ValueError(
            f"guidance_distillation_scale takes the model without its adapter for the teacher, but the adapter on "
            f"{changing[0]} changes the model already. Merge it (model.merge_and_unload()) and start a fresh adapter "
            "with the default init_lora_weights."
        )


def _changes(layer: LoraLayer) -> bool:
    """Whether the product of an adapter's two factors is anything but zero."""
    pairs = [(layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)]
    # modules on linear layers, plain tensors on embeddings
    factors = [[getattr(side[name], "weight", side[name]) for side in pair] for pair in pairs for name in pair[0]]
    return any(all(bool(factor.any()) for factor in pair) for pair in factors)
