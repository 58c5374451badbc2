"""Weights in 4 or 8 bits through bitsandbytes, for adapters to be trained on."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig


def quantization_config(
    quantization: str | BitsAndBytesConfig | None, dtype: torch.dtype | str
) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' configuration of one of the words of `load_model`.

    Args:
        quantization: None, "4bit" (NF4, double quantisation), "8bit", or a configuration, which stays as it is.
        dtype: of the other weights, and of the computation with 4-bit ones; "auto" computes in bfloat16.

    Raises:
        ValueError: for any other word.
    """
    if quantization is None or isinstance(quantization, BitsAndBytesConfig):
        return quantization
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise ValueError(f"quantization={quantization!r} is unknown; use None, '4bit', '8bit' or a BitsAndBytesConfig")


def is_quantized(model: Any) -> bool:
    """Whether a model's linear layers hold 4- or 8-bit weights of bitsandbytes."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def steady_quantized_layers(model: nn.Module) -> None:
    """Make quantised layers compute the same in evaluation as in training, and say each warning once.

    On CPUs with AVX512-BF16, the first evaluation makes bitsandbytes repack 4-bit weights for a kernel that rounds
    their scales and the input to bfloat16, has no gradient (training goes on without the part of the gradient that
    passes the quantised layers) and demands layer widths that are multiples of 64. It is switched off: slower
    evaluation, the same numbers everywhere.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    if getattr(model, "is_loaded_in_8bit", False):
        logger = logging.getLogger("bitsandbytes.autograd._functions")
        if not any(isinstance(present, _Once) for present in logger.filters):
            logger.addFilter(_Once())


class _Once(logging.Filter):
    """Lets each message through once: that inputs are cast is said at every product of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new
