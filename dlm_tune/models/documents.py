"""Packed rows: several documents in one sequence that do not see each other."""

from typing import Any

import torch
from torch import Tensor


def document_position_ids(document_ids: Tensor) -> Tensor:
    """Return (B, L) positions that restart at 0 with each document of `document_ids` (B, L)."""
    columns = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return columns - columns.where(is_start, 0).cummax(dim=1).values


def document_attention(document_ids: Tensor, model: Any) -> tuple[Tensor | None, dict[str, Any]]:
    """Return the attention mask, and further arguments of the transformer, that keep documents apart.

    Padding (id 0) is a document of its own, so that no query attends to nothing.

    Args:
        document_ids: (B, L) long.
        model: the model, for its attention implementation.
    """
    return (document_ids[:, None, :, None] == document_ids[:, None, None, :]), {}
