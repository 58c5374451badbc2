"""Text from a diffusion language model: the sampler, its options, prompts and the terminal chat."""

from dlm_tune.generation.config import DiffusionGenerationConfig
from dlm_tune.generation.sampler import DiffusionGenerationOutput, generate

__all__ = ["DiffusionGenerationConfig", "DiffusionGenerationOutput", "generate"]
