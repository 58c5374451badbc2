"""Random models and a real character tokenizer, small enough for every test."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm_tune.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from dlm_tune.models.families import FAMILIES, family_chat_template

# Ids: 0 EOS (also pad, as published), 1 BOS, 2 mask, 3.. the turn markers, then printable ASCII.
EOS_ID, BOS_ID, MASK_ID = 0, 1, 2
_SPECIAL_TOKENS = {
    "llada": [
        "<|endoftext|>",
        "<|startoftext|>",
        "<|mdm_mask|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
    "Dream": ["<|endoftext|>", "<|beginoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>", "<|dlm_pad|>"],
}
_CHARACTERS = sorted(set(string.printable) - set("\r\x0b\x0c"))
VOCAB_SIZE = 128

# Arguments of a run of a few steps that leaves no files but those asked for
SHORT_RUN: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
}


def tiny_tokenizer(family: str = "llada", *, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """One token per character (printable ASCII), plus the family's special tokens; pad is EOS, as published."""
    special = _SPECIAL_TOKENS[family]
    vocabulary = {token: index for index, token in enumerate([*special, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    eos, bos, mask, *others = special
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=eos,
        bos_token=bos,
        mask_token=mask,
        additional_special_tokens=others,
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        facts = FAMILIES[family]
        fast.chat_template = family_chat_template(facts, facts.end_of_turn_token)
    return fast


def tiny_llada(vocab_size: int = VOCAB_SIZE, *, seed: int = 0, **config: Any) -> LLaDAModelLM:
    """Random LLaDA, 2 blocks of width 32; `config` overrides any key of LLaDAConfig."""
    settings = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "mlp_hidden_size": 64,
        "vocab_size": vocab_size,
        "embedding_size": vocab_size,
        "max_sequence_length": 256,
        "mask_token_id": MASK_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "init_std": 0.2,
    }
    torch.manual_seed(seed)
    return LLaDAModelLM(LLaDAConfig(**(settings | config))).eval()


def tiny_dream(vocab_size: int = VOCAB_SIZE, *, seed: int = 0, **config: Any) -> DreamModel:
    """Random Dream with grouped-query attention, 2 layers of width 32; `config` overrides any key of DreamConfig."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": vocab_size,
        "max_position_embeddings": 256,
        "rope_theta": 1000000.0,
        "mask_token_id": MASK_ID,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return DreamModel(DreamConfig(**(settings | config))).eval()


def save_tiny_checkpoint(directory: str | Path, family: str = "llada", *, seed: int = 0, **config: Any) -> Path:
    """Save a complete checkpoint directory (config, weights, tokenizer) in the family's original layout."""
    directory = Path(directory)
    model = {"llada": tiny_llada, "Dream": tiny_dream}[family](seed=seed, **config)
    model.save_pretrained(directory)
    tiny_tokenizer(family).save_pretrained(directory)
    return directory
