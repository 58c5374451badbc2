"""The canvas that a sampler fills: left-padded prompts followed by masks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Canvas:
    """State of `B` rows of `T = prompt_length + max_new_tokens` positions; the sampler changes it in place.

    Attributes:
        tokens: `(B, T)` ids; positions not committed yet hold the mask token.
        is_masked: `(B, T)` bool, the positions not committed yet. Only new positions ever are.
        attention_mask: `(B, T)`, 0 at padding, or None when no row is padded.
        committed_at: `(B, T - prompt_length)` step that committed each token, -1 where none did.
        prompt_length: width of the padded prompts.
    """

    tokens: Tensor
    is_masked: Tensor
    attention_mask: Tensor | None
    committed_at: Tensor
    prompt_length: int

    def commit(self, rows: Tensor, columns: slice, is_committed: Tensor, proposals: Tensor, step: int) -> None:
        """Write `proposals` `(R, C)` where `is_committed` `(R, C)`, in `rows` `(R,)` and the block `columns`."""
        new_columns = slice(columns.start - self.prompt_length, columns.stop - self.prompt_length)
        self.tokens[rows, columns] = torch.where(is_committed, proposals, self.tokens[rows, columns])
        self.is_masked[rows, columns] &= ~is_committed
        self.committed_at[rows, new_columns] = self.committed_at[rows, new_columns].masked_fill(is_committed, step)

    def end_rows(self, eos_token_ids: Tensor, fill_token_id: int) -> None:
        """Fill with `fill_token_id` what follows the first EOS of each row, once all before that EOS is committed."""
        tokens, is_masked = self.tokens[:, self.prompt_length :], self.is_masked[:, self.prompt_length :]
        is_eos = torch.isin(tokens, eos_token_ids) & ~is_masked
        eos_seen = is_eos.cumsum(1)
        has_gap = (is_masked & (eos_seen == 0)).any(1, keepdim=True)
        after_eos = (eos_seen - is_eos.long() > 0) & ~has_gap
        tokens.masked_fill_(after_eos, fill_token_id)
        is_masked.masked_fill_(after_eos, False)
        self.committed_at.masked_fill_(after_eos, -1)


def make_canvas(input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, model_config: Any) -> Canvas:
    """Check the prompts and append `max_new_tokens` masks to each.

    Args:
        input_ids: `(B, P)` prompts, left-padded; `P` may be 0.
        attention_mask: `(B, P)`, 0 at padding, or None.
        max_new_tokens: masks to append.
        model_config: gives `mask_token_id`, and, where present, `logits_shift` and `max_position_embeddings`.

    Raises:
        ValueError: wrong shapes, padding that is not on the left, mask tokens in a prompt, a prompt and canvas longer
            than the model's positions, or a model without a mask token.
    """
    mask_token_id = getattr(model_config, "mask_token_id", None)
    if mask_token_id is None:
        raise ValueError(
            "model.config.mask_token_id=None: the sampler fills mask tokens. Load the model with dlm_tune.load_model, "
            "or set config.mask_token_id to the id of the token it was trained with."
        )
    if not isinstance(input_ids, torch.Tensor):
        raise ValueError(
            f"input_ids is a {type(input_ids).__name__}, not a tensor: tokenise the prompt, for example "
            'torch.tensor([tokenizer("...")["input_ids"]]).'
        )
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)} and dtype {input_ids.dtype} are not prompts: pass token ids "
            "of shape (rows, prompt length)."
        )
    prompt_length = input_ids.shape[1]
    max_positions = getattr(model_config, "max_position_embeddings", None)
    if max_positions is not None and prompt_length + max_new_tokens > max_positions:
        room = max_positions - prompt_length
        remedy = f"Shorten the prompts or use max_new_tokens={room} or less." if room > 0 else "Shorten the prompts."
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after prompts of {prompt_length} tokens makes "
            f"{prompt_length + max_new_tokens} positions; the model has {max_positions}. {remedy}"
        )
    prompt_mask = _check_padding(input_ids, attention_mask)
    _check_mask_tokens(input_ids, prompt_mask, mask_token_id)
    if getattr(model_config, "logits_shift", False) and not bool(prompt_mask.any(1).all()):
        raise ValueError(
            "a prompt is empty, and this model predicts a token from the position before it (logits_shift=True). "
            "Begin the prompt with the tokenizer's BOS token."
        )
    new_shape = (input_ids.shape[0], max_new_tokens)
    tokens = torch.cat([input_ids.long(), input_ids.new_full(new_shape, mask_token_id, dtype=torch.long)], dim=1)
    is_masked = torch.zeros_like(tokens, dtype=torch.bool)
    is_masked[:, prompt_length:] = True
    is_padded = not bool(prompt_mask.all())
    return Canvas(
        tokens=tokens,
        is_masked=is_masked,
        attention_mask=torch.cat([prompt_mask, prompt_mask.new_ones(new_shape)], 1).long() if is_padded else None,
        committed_at=tokens.new_full(new_shape, -1),
        prompt_length=prompt_length,
    )


def _check_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit input_ids of shape "
            f"{tuple(input_ids.shape)}: pass one number a token, 0 at padding."
        )
    prompt_mask = attention_mask.bool()
    is_right_padded = (prompt_mask[:, :-1] & ~prompt_mask[:, 1:]).any(1)
    if bool(is_right_padded.any()):
        raise ValueError(
            f"row {int(is_right_padded.nonzero()[0])} has padding after its prompt: new tokens are appended on the "
            "right. Pad on the left (tokenizer.padding_side = 'left')."
        )
    return prompt_mask


def _check_mask_tokens(input_ids: Tensor, prompt_mask: Tensor, mask_token_id: int) -> None:
    places = ((input_ids == mask_token_id) & prompt_mask).nonzero()
    if len(places):
        row, position = places[0].tolist()
        raise ValueError(
            f"row {row} holds the mask token (id {mask_token_id}) at position {position} of its prompt: only the new "
            "tokens after a prompt are generated. Remove it from the prompt."
        )
