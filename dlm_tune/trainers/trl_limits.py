"""Limits of TRL's trainer that do not hold for this package's loss, and what it does to adapters that should stay."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from trl.trainer import sft_trainer


class _NoLayer:
    """What no module is an instance of."""


@contextmanager
def adapters_on_the_head() -> Iterator[None]:
    """Let `SFTTrainer.__init__` take a LoRA adapter on the LM head.

    TRL refuses it because its loss multiplies by the weight of the head, past the adapter; `score_targets` calls a
    head that is more than a plain linear layer.
    """
    layer = sft_trainer.BaseTunerLayer
    sft_trainer.BaseTunerLayer = _NoLayer
    try:
        yield
    finally:
        sft_trainer.BaseTunerLayer = layer


@contextmanager
def adapters_keep_their_type(model: Any) -> Iterator[None]:
    """Leave the trained weights of a quantised model in the type that they were made or loaded in.

    `SFTTrainer.__init__` casts them to bfloat16, in which the small updates of a small learning rate are lost; PEFT
    makes them in float32.

    Args:
        model: what the trainer is given; with an adapter already, or without.
    """
    trained: dict[nn.Parameter, Tensor] = {}
    get_peft_model = sft_trainer.get_peft_model

    def note(peft_model: Any) -> Any:
        trained.update((parameter, parameter.data) for parameter in peft_model.parameters() if parameter.requires_grad)
        return peft_model

    sft_trainer.get_peft_model = lambda *args, **kwargs: note(get_peft_model(*args, **kwargs))
    if isinstance(model, PeftModel):
        note(model)
    try:
        yield
    finally:
        sft_trainer.get_peft_model = get_peft_model
        for parameter, data in trained.items():
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
