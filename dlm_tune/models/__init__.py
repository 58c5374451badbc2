"""Diffusion language models on transformers' own modules: native classes, loading, and the LM head at chosen positions.

Importing this package registers LLaDA and Dream with transformers' Auto classes; remote code is never needed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from dlm_tune.models.dream import DreamConfig, DreamModel
from dlm_tune.models.llada import LLaDAConfig, LLaDAModelLM
from dlm_tune.models.mixin import DiffusionMixin, MaskedTokenScores

__all__ = [
    "DiffusionMixin",
    "DreamConfig",
    "DreamModel",
    "LLaDAConfig",
    "LLaDAModelLM",
    "MaskedTokenScores",
]

for _config_class, _model_class in ((LLaDAConfig, LLaDAModelLM), (DreamConfig, DreamModel)):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        _auto_class.register(_config_class, _model_class, exist_ok=True)
