"""Diffusion language models on transformers' own modules: classes, loading, the LM head at chosen positions.

Importing this package registers LLaDA and Dream with transformers' Auto classes; remote code is never needed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from dlm_tune.diffusion import guidance_keep_token_ids
from dlm_tune.models.adapter_facts import write_adapter_facts
from dlm_tune.models.convert import convert_checkpoint
from dlm_tune.models.documents import check_packed_attention
from dlm_tune.models.dream import DreamConfig, DreamModel
from dlm_tune.models.families import FAMILIES, ModelFamily, end_of_turn_ids
from dlm_tune.models.llada import LLaDAConfig, LLaDAModelLM
from dlm_tune.models.loading import load_model
from dlm_tune.models.merge import MergedCheckpoint, merge_adapter
from dlm_tune.models.mixin import DiffusionMixin, MaskedTokenScores
from dlm_tune.models.smdm import convert_smdm
from dlm_tune.models.tokenizer import embedding_rows, load_tokenizer

__all__ = [
    "FAMILIES",
    "DiffusionMixin",
    "DreamConfig",
    "DreamModel",
    "LLaDAConfig",
    "LLaDAModelLM",
    "MaskedTokenScores",
    "MergedCheckpoint",
    "ModelFamily",
    "check_packed_attention",
    "convert_checkpoint",
    "convert_smdm",
    "embedding_rows",
    "end_of_turn_ids",
    "guidance_keep_token_ids",
    "load_model",
    "load_tokenizer",
    "merge_adapter",
    "write_adapter_facts",
]

for _config_class, _model_class in ((LLaDAConfig, LLaDAModelLM), (DreamConfig, DreamModel)):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        _auto_class.register(_config_class, _model_class, exist_ok=True)
