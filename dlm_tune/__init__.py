"""Fine-tuning and alignment of diffusion language models on top of Hugging Face.

The public names below are imported on first use, so that `import dlm_tune` costs nothing and does not import torch.
"""

from importlib import import_module
from typing import Any

from dlm_tune.auto_classes import register_on_use

__version__ = "0.1.0"

_PUBLIC_NAMES = {
    "DiffusionConfig": "dlm_tune.trainers",
    "DiffusionTrainer": "dlm_tune.trainers",
    "LLaDAConfig": "dlm_tune.models",
    "LLaDAModelLM": "dlm_tune.models",
    "DreamConfig": "dlm_tune.models",
    "DreamModel": "dlm_tune.models",
    "load_model": "dlm_tune.models",
    "load_tokenizer": "dlm_tune.models",
    "convert_checkpoint": "dlm_tune.models",
    "convert_smdm": "dlm_tune.models",
    "merge_adapter": "dlm_tune.models",
    "generate": "dlm_tune.generation",
    "DiffusionGenerationConfig": "dlm_tune.generation",
    "ClassifierGuidance": "dlm_tune.diffusion",
    "estimate_nelbo": "dlm_tune.evaluation",
    "log_likelihood": "dlm_tune.evaluation",
    "push_to_hub": "dlm_tune.hub",
}

__all__ = ["__version__", *_PUBLIC_NAMES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC_NAMES:
        return getattr(import_module(_PUBLIC_NAMES[name]), name)
    raise AttributeError(f"module 'dlm_tune' has no attribute '{name}'; it has: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__


register_on_use()
