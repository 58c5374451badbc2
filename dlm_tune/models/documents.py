"""Packed rows: several documents in one sequence that do not see each other."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3")
PACKED_ATTENTION = ("sdpa", "eager", "flex_attention", *FLASH_ATTENTION)


def document_position_ids(document_ids: Tensor) -> Tensor:
    """Return (B, L) positions that restart at 0 with each document of `document_ids` (B, L)."""
    columns = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return columns - columns.where(_is_start(document_ids), 0).cummax(dim=1).values


def document_attention(document_ids: Tensor, model: Any) -> tuple[Any, dict[str, Any]]:
    """Return the attention mask, and further arguments of the transformer, that keep documents apart.

    Padding (id 0) is a document of its own, so that no query attends to nothing. Where `config.is_causal` is true (a
    model that was not converted by `load_model`), a token sees the earlier ones of its document only.

    Args:
        document_ids: (B, L) long; the tokens of a document are contiguous.
        model: the model, for its attention implementation.

    Returns:
        For `sdpa` and `eager` a (B, 1, L, L) bool mask, True where query attends to key. For `flex_attention` a
        BlockMask. For the flash attentions no mask, and the boundaries of the documents in the flattened (B * L,)
        sequence; this reads their number from the device, once a forward.

    Raises:
        ValueError: the model uses another attention implementation.
    """
    check_packed_attention(model)
    implementation = model.config._attn_implementation
    is_causal = getattr(model.config, "is_causal", True)  # transformers' default
    if implementation in ("sdpa", "eager"):
        mask = document_ids[:, None, :, None] == document_ids[:, None, None, :]
        return (mask.tril() if is_causal else mask), {}
    if implementation == "flex_attention":
        return _block_mask(document_ids, is_causal), {}
    return None, _variable_lengths(document_ids)


def check_packed_attention(model: Any) -> None:
    """Refuse a model whose attention implementation cannot keep packed documents apart.

    Raises:
        ValueError: naming it, and those that can.
    """
    implementation = model.config._attn_implementation
    if implementation not in PACKED_ATTENTION:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot keep packed documents apart. Load the model with one of "
            f"{', '.join(PACKED_ATTENTION)}, or train without packing."
        )


def _is_start(document_ids: Tensor) -> Tensor:
    """(B, L) bool: the first token of each document, or of a run of padding."""
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return is_start


def _block_mask(document_ids: Tensor, is_causal: bool) -> Any:
    def attends(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document_ids[sequence, query] == document_ids[sequence, key]
        return same & (query >= key) if is_causal else same

    size, length = document_ids.shape
    return create_block_mask(attends, size, None, length, length, device=document_ids.device)


def _variable_lengths(document_ids: Tensor) -> dict[str, Any]:
    """Arguments of the kernels for rows of unequal length, which transformers calls on the flattened batch."""
    starts = _is_start(document_ids).flatten().nonzero().flatten()
    boundaries = torch.cat([starts, starts.new_tensor([document_ids.numel()])]).to(torch.int32)
    # an upper bound serves as well as the longest document, which would have to be read from the device
    longest = document_ids.shape[1]
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }
