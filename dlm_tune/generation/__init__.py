"""Text from a diffusion language model: the sampler, its options, prompts and the terminal chat."""

from dlm_tune.generation.config import DiffusionGenerationConfig
from dlm_tune.generation.prompts import (
    config_for_tokenizer,
    decode_completion,
    end_token_ids,
    pad_prompts,
    tokenize_prompt,
)
from dlm_tune.generation.sampler import DiffusionGenerationOutput, generate

__all__ = [
    "DiffusionGenerationConfig",
    "DiffusionGenerationOutput",
    "config_for_tokenizer",
    "decode_completion",
    "end_token_ids",
    "generate",
    "pad_prompts",
    "tokenize_prompt",
]
