"""What the model is called with to score the masked tokens of a corrupted batch."""

from typing import Any

import torch
from torch import Tensor, nn

from dlm_tune.data import document_ids, to_sequences
from dlm_tune.diffusion import NoisyBatch
from dlm_tune.models.annealing import annealed_attention
from dlm_tune.models.documents import document_position_ids


def masked_token_inputs(
    inputs: dict[str, Any], noisy: NoisyBatch, pad_token_id: int, token_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Arguments of the model's forward, of packed rows too; scores come in the order of `noisy.masked_rows`.

    Args:
        inputs: a batch of the collator, R rows; a `right_context` of annealed attention is honoured.
        noisy: its noise.
        pad_token_id: fills packed sequences.
        token_weights: (R, L) weights in the loss; without them no loss is asked for.
    """
    arguments = {
        "input_ids": to_sequences(noisy.noisy_input_ids, inputs, pad_token_id),
        "target_ids": to_sequences(inputs["input_ids"], inputs, pad_token_id),
        "target_mask": to_sequences(noisy.masked, inputs, False),
    }
    if token_weights is not None:
        arguments["target_weights"] = to_sequences(token_weights, inputs, 0.0)
    if "right_context" in inputs:
        documents = document_ids(inputs)
        row_index = nn.functional.pad(inputs["row_index"], (1, 0))[documents]  # 0 for padding
        mask = annealed_attention(documents, row_index, inputs["right_context"])
        return {"attention_mask": mask, "position_ids": document_position_ids(documents), **arguments}
    if "packed_position" in inputs:
        return {"document_ids": document_ids(inputs), **arguments}
    return {"attention_mask": inputs["attention_mask"], **arguments}


def prompt_mask(inputs: dict[str, Any]) -> Tensor:
    """(R, L) bool, tokens of a prompt: those attended that are no targets."""
    return inputs["attention_mask"].bool() & ~inputs["target_mask"]


def is_unpaired(inputs: dict[str, Any]) -> Tensor:
    """(R,) bool, rows that come from the unpaired data set."""
    unpaired = inputs.get("is_unpaired")
    return torch.zeros_like(inputs["row_index"], dtype=torch.bool) if unpaired is None else unpaired
