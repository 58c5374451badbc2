"""`dlm-tune convert`: a causal checkpoint, or one of SMDM, becomes a diffusion checkpoint."""

from typing import Any

import torch

from dlm_tune.commands.arguments import ConvertArguments
from dlm_tune.commands.console import say
from dlm_tune.models.convert import ConvertedCheckpoint, convert_checkpoint
from dlm_tune.models.smdm import convert_smdm
from dlm_tune.recipe import Recipe


def run_convert(recipe: Recipe) -> None:
    """Convert the checkpoint and say what was done."""
    (arguments,) = recipe.build()
    say(*summary(_convert(arguments)))


def _convert(arguments: ConvertArguments) -> ConvertedCheckpoint:
    assert arguments.model_name_or_path is not None  # checked by the arguments
    assert arguments.output_dir is not None
    common: dict[str, Any] = {
        "dtype": getattr(torch, arguments.dtype) if arguments.dtype else None,
        "max_shard_size": arguments.max_shard_size,
        "overwrite": arguments.overwrite,
    }
    if arguments.source == "smdm":
        assert arguments.tokenizer_name_or_path is not None
        return convert_smdm(
            arguments.model_name_or_path,
            arguments.output_dir,
            tokenizer=arguments.tokenizer_name_or_path,
            architecture=arguments.architecture,
            num_heads=arguments.num_heads,
            **common,
        )
    return convert_checkpoint(
        arguments.model_name_or_path,
        arguments.output_dir,
        mask_token=arguments.mask_token,
        mask_embedding=arguments.mask_embedding,
        logits_shift=arguments.logits_shift,
        revision=arguments.model_revision,
        **common,
    )


def summary(result: ConvertedCheckpoint) -> list[str]:
    """Lines on what a conversion did."""
    grown = "" if result.rows == result.rows_before else f", before {result.rows_before:,}"
    shift = "yes: position i is predicted from i - 1" if result.logits_shift else "no: each position in place"
    facts = {
        "model": f"{result.model_type}, {result.num_parameters:,} parameters, {str(result.dtype).split('.')[-1]}",
        "attention": "in both directions (is_causal: false)",
        "embedding rows": f"{result.rows:,}{grown}",
        "mask token": f"{result.mask_token}, id {result.mask_token_id}, embedding: {result.mask_embedding}",
        "logits shift": shift,
        "size": f"{result.num_bytes / 1e6:,.1f} MB",
    }
    return [f"Written to {result.directory}:", *(f"  {name:<16}{text}" for name, text in facts.items())]
