"""Limits of TRL's trainer that do not hold for this package's loss."""

from collections.abc import Iterator
from contextlib import contextmanager

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
