"""`dlm-tune merge`: adapter and base become one checkpoint."""

import time
from pathlib import Path

import yaml

from dlm_tune.commands.arguments import MergeArguments
from dlm_tune.commands.console import say
from dlm_tune.models.merge import merge_adapter
from dlm_tune.recipe import Recipe


def run_merge(recipe: Recipe) -> None:
    """Merge and say what was written."""
    (arguments,) = recipe.build()
    assert arguments.adapter is not None  # checked by the arguments
    assert arguments.output_dir is not None
    start = time.perf_counter()
    result = merge_adapter(
        arguments.adapter,
        arguments.output_dir,
        base=arguments.model_name_or_path,
        base_revision=arguments.model_revision,
        dtype=arguments.dtype,
        layout=arguments.layout,
        max_shard_size=arguments.max_shard_size,
        base_quantization=arguments.base_quantization,
        overwrite=arguments.overwrite,
    )
    files = "1 file" if result.num_files == 1 else f"{result.num_files} files"
    say(
        f"Merged {arguments.adapter} into {result.base}: {result.num_merged} of {result.num_weights} weights changed, "
        f"{result.num_parameters:,} parameters, {str(result.dtype).removeprefix('torch.')}, {result.layout} layout, "
        f"{result.num_bytes / 1e6:,.1f} MB in {files}, {time.perf_counter() - start:.1f} s.",
        *_hints(arguments),
        f"It lies in {result.directory}. Next:",
        f"  dlm-tune generate --model_name_or_path {result.directory} --prompt 'TEXT'",
    )


def _hints(arguments: MergeArguments) -> list[str]:
    """What the recipe of the adapter says that the merge did not take into account."""
    file = Path(str(arguments.adapter)) / "recipe.yaml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    settings = settings or {}
    is_4bit, rounds = bool(settings.get("load_in_4bit")), arguments.base_quantization is not None
    kind, is_nested = settings.get("bnb_4bit_quant_type", "nf4"), bool(settings.get("use_bnb_nested_quant"))
    if is_4bit and (kind, is_nested) != ("nf4", True):
        doubly = "with" if is_nested else "without"
        return [
            f"Note: the adapter was trained on weights in {kind.upper()} {doubly} double quantisation. The merge is "
            + (
                "into NF4 with it"
                if rounds
                else "into those of the files (--base_quantization 4bit: into NF4 with it)"
            )
            + ", which is close to the model of the training and not equal."
        ]
    if is_4bit and not rounds:
        return [
            "Note: the adapter was trained on weights in 4 bits and is merged into those of the files. For the very "
            "model of the training add --base_quantization 4bit."
        ]
    if file.is_file() and rounds and not is_4bit:
        return [f"Note: {file} has no load_in_4bit: the adapter was trained on weights that were not rounded."]
    return []
