"""The weights of a checkpoint directory, read and written one at a time."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlm_tune.models.checkpoint_files import read_json

_STEM = "model"
# Endings of the tensors in which bitsandbytes keeps how a weight was quantised
_QUANTIZATION_PARTS = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.",
    ".SCB",
    ".weight_format",
)
_FLOATING_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class WeightFiles:
    """Random access to the tensors of a directory's safetensors files, dequantised where bitsandbytes wrote them.

    Args:
        directory: the checkpoint.
        rename: from a name in the files to the name in memory.
    """

    def __init__(self, directory: Path, rename: Callable[[str], str]) -> None:
        index = directory / f"{_STEM}.safetensors.index.json"
        shards = set(read_json(index)["weight_map"].values()) if index.is_file() else {f"{_STEM}.safetensors"}
        self._places: dict[str, tuple[Path, str]] = {}
        self._numbers: Counter[torch.dtype] = Counter()  # in all weights of a floating-point type
        for file in (directory / shard for shard in sorted(shards)):
            with safe_open(file, framework="pt") as opened:
                self._places |= {rename(key): (file, key) for key in opened.keys()}  # noqa: SIM118
                for part in map(opened.get_slice, filter(_is_weight, opened.keys())):
                    if part.get_dtype() in _FLOATING_TYPES:
                        self._numbers[_FLOATING_TYPES[part.get_dtype()]] += math.prod(part.get_shape())

    @property
    def names(self) -> list[str]:
        """In-memory names of all weights."""
        return list(filter(_is_weight, self._places))

    def shape(self, name: str) -> list[int]:
        """Shape of a weight as the model has it."""
        if self._is_4bit(name):
            return list(self._quant_state(name).shape)
        file, key = self._places[name]
        with safe_open(file, framework="pt") as opened:
            return list(opened.get_slice(key).get_shape())

    def read(self, name: str) -> Tensor:
        """A weight in its floating-point type; one in 4 or 8 bits as its layer computes with it."""
        tensor = self._stored(name)
        if self._is_4bit(name):
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(tensor, self._quant_state(name))
        if tensor.dtype == torch.int8:
            from bitsandbytes.functional import int8_vectorwise_dequant

            return int8_vectorwise_dequant(tensor, self._stored(name.removesuffix("weight") + "SCB"))
        return tensor

    def dtype(self) -> torch.dtype:
        """Floating-point type of most numbers in the files."""
        [(dtype, _)] = self._numbers.most_common(1)
        return dtype

    def _stored(self, name: str) -> Tensor:
        file, key = self._places[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)

    def _is_4bit(self, name: str) -> bool:
        return f"{name}.absmax" in self._places

    def _quant_state(self, name: str) -> Any:
        from bitsandbytes.functional import QuantState

        parts = [part for part in self._places if part.startswith(f"{name}.")]
        stored = {part.removeprefix(f"{name}."): self._stored(part) for part in parts}
        return QuantState.from_dict(stored, device=torch.device("cpu"))


def _is_weight(name: str) -> bool:
    return not any(part in name for part in _QUANTIZATION_PARTS)


def round_to_4bit(weight: Tensor) -> Tensor:
    """The weight that a layer of `load_model(..., quantization="4bit")` computes with."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True))


def write_shards(
    directory: Path,
    shapes: Mapping[str, Iterable[int]],
    make: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_size: str,
) -> list[Path]:
    """Write weights as transformers does, holding those of one file at a time.

    Args:
        directory: existing directory.
        shapes: name in the files -> shape, in the order of writing.
        make: the tensor of a name, in any floating-point type; it is rounded to `dtype`.
        dtype: of all weights.
        max_shard_size: such as "5GB"; a larger weight is a file of its own.

    Raises:
        ValueError: a weight is not finite in `dtype`, or `max_shard_size` cannot be read.
    """
    plan = split_state_dict_into_shards_factory(
        {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in shapes.items()},
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{_STEM}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: _rounded(make(name), dtype, name) for name in names}, directory / file, {"format": "pt"})
    if plan.is_sharded:
        content = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        index = directory / f"{_STEM}.safetensors.index.json"
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [directory / file for file in plan.filename_to_tensors]


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = tensor.to(dtype).contiguous()
    if not rounded.isfinite().all():
        raise ValueError(
            f"{name} is not finite in {str(dtype).removeprefix('torch.')} (largest value "
            f"{tensor.abs().max().item():.3g}); use dtype bfloat16 or float32, or look for a training that diverged"
        )
    return rounded
