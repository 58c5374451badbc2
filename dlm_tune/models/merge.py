"""A PEFT adapter is merged into its base model, weight by weight: an 8B model needs the memory of one file of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedConfig

from dlm_tune.models.adapters import base_of_adapter
from dlm_tune.models.checkpoint_files import check_weight_files, checkpoint_directory, is_adapter_directory
from dlm_tune.models.llada import to_original_name
from dlm_tune.models.loading import load_config
from dlm_tune.models.merged_files import write_small_files
from dlm_tune.models.merged_weights import StreamedWeights, WholeModelWeights, can_stream
from dlm_tune.models.output_directory import check_shard_size, new_directory
from dlm_tune.models.weight_files import write_shards

LAYOUTS = ("original", "hf")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class MergedCheckpoint:
    """What a merge did.

    Attributes:
        directory: where the checkpoint is.
        base: name or directory of the base model.
        num_merged: weights that the adapter changed.
        num_weights: all weights.
        num_parameters: tied weights counted once.
        dtype: of the weights.
        layout: "original" or "hf".
        num_files: files of weights.
        num_bytes: size of them.
    """

    directory: Path
    base: str
    num_merged: int
    num_weights: int
    num_parameters: int
    dtype: torch.dtype
    layout: str
    num_files: int
    num_bytes: int


def merge_adapter(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    base_revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    layout: str = "original",
    max_shard_size: str = "5GB",
    base_quantization: str | None = None,
    overwrite: bool = False,
) -> MergedCheckpoint:
    """Write adapter and base as one checkpoint that needs neither.

    Every weight is merged in float32 with PEFT's own arithmetic and rounded once. The logits are those of the adapter
    on its base. The directory appears complete or not at all.

    Args:
        adapter: directory or Hub name of a PEFT adapter.
        output_dir: directory to write.
        base: directory or Hub name of the base; None takes the one that the adapter names.
        base_revision: of the Hub repository `base`.
        dtype: "bfloat16", "float16" or "float32"; None keeps the base's.
        layout: weights named as in the authors' files ("original"), or as transformers' modules ("hf").
        max_shard_size: largest file of weights; one file and one weight in float32 are held in memory.
        base_quantization: "4bit" merges into the weights that a model loaded in 4 bits computes with, on which an
            adapter of QLoRA was trained; None merges into the weights of the files.
        overwrite: replace a checkpoint in `output_dir`.

    Raises:
        ValueError: naming what is at fault and the remedy: no adapter, another base than the adapter's, an adapter
            that cannot be merged, damaged files, an output directory that is not empty.
        OSError: the disk is full, or another fault of writing.
    """
    resolved = _check_choices(dtype, layout, base_quantization, max_shard_size)
    adapter_directory = _adapter_directory(adapter)
    base, base_directory = _base_directory(adapter_directory, base, base_revision)
    config, _ = load_config(base_directory)
    check_weight_files(base_directory)
    _check_quantization(config, base_directory, base_quantization)
    with new_directory(output_dir, overwrite=overwrite, sources=[base_directory, adapter_directory]) as folder:
        if can_stream(PeftConfig.from_pretrained(str(adapter_directory))):
            weights: Any = StreamedWeights(base, base_directory, adapter_directory, config, base_quantization)
        else:
            weights = WholeModelWeights(base_directory, adapter_directory, base_quantization)
        resolved = resolved or weights.base_dtype
        to_file_name = to_original_name if layout == "original" and config.model_type == "llada" else str
        names = {to_file_name(name): name for name in weights.shapes}
        files = write_shards(
            folder,
            {name: weights.shapes[native] for name, native in names.items()},
            lambda name: weights.merged(names[name]),
            resolved,
            max_shard_size,
        )
        write_small_files(folder, base_directory, adapter_directory, weights.config, resolved, base, base_quantization)
        num_bytes = sum(file.stat().st_size for file in files)
    return MergedCheckpoint(
        directory=Path(output_dir),
        base=base,
        num_merged=weights.num_merged,
        num_weights=len(names),
        num_parameters=sum(shape.numel() for shape in weights.shapes.values()),
        dtype=resolved,
        layout=layout,
        num_files=len(files),
        num_bytes=num_bytes,
    )


def _check_choices(
    dtype: torch.dtype | str | None, layout: str, base_quantization: str | None, max_shard_size: str
) -> torch.dtype | None:
    check_shard_size(max_shard_size)
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; use {' or '.join(map(repr, LAYOUTS))}")
    if base_quantization not in (None, "4bit"):
        raise ValueError(
            f"base_quantization={base_quantization!r} cannot be merged into: use '4bit', or None for the weights of "
            "the files (layers in 8 bits round their inputs too, which no weights can do)"
        )
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype={name!r} is not a type to merge to; use {', '.join(DTYPES)} or None for the base's")
    return None if name is None else getattr(torch, name)


def _adapter_directory(adapter: str | Path) -> Path:
    directory = checkpoint_directory(adapter)
    if not is_adapter_directory(directory):
        found = "a full model (config.json)" if (directory / "config.json").is_file() else "no adapter_config.json"
        raise ValueError(f"adapter={str(adapter)!r} holds {found}; give the directory of a saved adapter")
    check_weight_files(directory, "adapter_model")
    return directory


def _base_directory(adapter_directory: Path, base: str | Path | None, revision: str | None) -> tuple[str, Path]:
    if base is None:
        try:
            base, revision = base_of_adapter(adapter_directory)
        except ValueError as error:
            raise ValueError(f"{error}; to merge, give the base with base= (--model_name_or_path)") from error
    directory = checkpoint_directory(base, revision)
    if is_adapter_directory(directory):
        raise ValueError(
            f"the base {str(base)!r} is itself an adapter: merge that one first, and this one into the result"
        )
    return str(base), directory


def _check_quantization(config: PreTrainedConfig, directory: Path, base_quantization: str | None) -> None:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    method = getattr(method, "value", method)
    if method != "bitsandbytes":
        raise ValueError(
            f"the weights in {directory} are quantised by {method}, which is not read here; merge into the checkpoint "
            "they were made from, with base= (--model_name_or_path)"
        )
    if base_quantization is not None:
        raise ValueError(
            f"base_quantization={base_quantization!r}: the weights in {directory} are quantised already; leave it out"
        )
