"""Between text and the sampler: prompts as training tokenised them, the tokens that end an answer, and back."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dlm_tune.generation.config import DiffusionGenerationConfig

Prompt = str | list[dict[str, Any]]

_PROBE = "probe"


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, tokenised as TRL's SFT data preparation does.

    Text goes through the tokenizer as it is, with the special tokens that the tokenizer itself adds. Messages go
    through the chat template, which opens the assistant's turn.

    Raises:
        ValueError: messages for a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError(
            "the prompt is a list of messages, but the tokenizer has no chat template. Load it with "
            "dlm_tune.load_tokenizer, set tokenizer.chat_template, or pass the prompt as text."
        )
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def pad_prompts(
    rows: Sequence[Sequence[int]], pad_token_id: int | None, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, both `(B, P)` long, padded on the left to the longest row."""
    length = max((len(row) for row in rows), default=0)
    fill = 0 if pad_token_id is None else pad_token_id
    input_ids = [[fill] * (length - len(row)) + list(row) for row in rows]
    attention_mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    shape = (len(rows), length)
    return (
        torch.tensor(input_ids, dtype=torch.long, device=device).view(shape),
        torch.tensor(attention_mask, dtype=torch.long, device=device).view(shape),
    )


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The EOS token, and the special token with which the chat template closes an assistant's turn."""
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_PROBE)[2]
        special = set(tokenizer.all_special_ids)
        special.update(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
        ids.update(id for id in tokenizer(after, add_special_tokens=False)["input_ids"][:1] if id in special)
    return sorted(ids)


def config_for_tokenizer(
    config: DiffusionGenerationConfig, tokenizer: PreTrainedTokenizerBase, model: Any
) -> DiffusionGenerationConfig:
    """The configuration with what the tokenizer knows.

    `eos_token_ids`, unless set, become those of `end_token_ids`. Rows of the LM head for which the tokenizer has no
    token (padding of the vocabulary) join `suppress_tokens`.
    """
    num_logits = model.get_output_embeddings().weight.shape[0]
    without_token = set(range(num_logits)) - set(tokenizer.get_vocab().values())
    return dataclasses.replace(
        config,
        eos_token_ids=end_token_ids(tokenizer) if config.eos_token_ids is None else config.eos_token_ids,
        suppress_tokens=sorted(without_token.union(config.suppress_tokens or [])),
    )


def decode_completion(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    end_ids: Collection[int],
    *,
    skip_special_tokens: bool = True,
) -> str:
    """Text of the new tokens of a row up to its first end token, which is left out."""
    end = next((place for place, token_id in enumerate(token_ids) if token_id in end_ids), len(token_ids))
    return tokenizer.decode(list(token_ids[:end]), skip_special_tokens=skip_special_tokens)
