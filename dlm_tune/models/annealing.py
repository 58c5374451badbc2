"""Attention that grows from causal to bidirectional, for models that were trained to predict the next token.

DiffuLLaMA (Gong et al., "Scaling Diffusion Language Models via Adaptation from Autoregressive Models", arXiv
2410.17891): a token sees all earlier ones, and each later one with a probability that rises linearly to 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_tune.diffusion import NoiseStream, counter_uniform
from dlm_tune.models.documents import document_position_ids
from dlm_tune.models.dream import DreamModel
from dlm_tune.models.llada import LLaDAModelLM

ANNEALED_ATTENTION = ("sdpa", "eager")  # those that take any mask of (B, 1, L, L)


@dataclass(frozen=True)
class RightContext:
    """What tokens see of those behind them at one optimiser step.

    Attributes:
        share: probability that a token sees a certain later one of its document; 0 is causal, 1 bidirectional.
        seed: of the draw.
        step: optimiser step; which later tokens are seen is drawn anew at each.
    """

    share: float
    seed: int
    step: int


def right_context_share(step: int, annealing_steps: int) -> float:
    """Return min(1, (step + 1) / annealing_steps), the share of later tokens that are seen at a step from 0 on.

    The first step is nearly causal and step `annealing_steps - 1` is the first with full attention, as in the authors'
    trainer. 0 annealing steps are none.
    """
    return min(1.0, (step + 1) / max(annealing_steps, 1))


def annealed_attention(document_ids: Tensor, row_index: Tensor, right_context: RightContext) -> Tensor:
    """Return the (B, 1, L, L) bool mask, True where query attends to key.

    A token sees itself and all earlier tokens of its document, and each later one with probability
    `right_context.share`. The draw is keyed by (seed, step, row index, place of query and of key in the document): it
    is the same for any number of processes, any microbatch size, padding and packing.

    Args:
        document_ids: (B, L) long; the tokens of a document are contiguous. Padding (id 0) is a document of its own.
        row_index: (B, L) long, index in the data set of the row that each token belongs to; any number for padding.
        right_context: what is seen of later tokens.
    """
    size, length = document_ids.shape
    positions = document_position_ids(document_ids)
    mask = torch.ones(size, 1, length, length, dtype=torch.bool, device=document_ids.device).tril_()
    for row in range(size):  # one by one: the hash takes several int64 numbers an entry
        key = (right_context.step, row_index[row, :, None], positions[row, :, None], positions[row, None, :])
        draw = counter_uniform(right_context.seed, NoiseStream.RIGHT_CONTEXT, *key)
        mask[row, 0] |= draw < right_context.share
        mask[row, 0] &= document_ids[row, :, None] == document_ids[row, None, :]
    return mask


def check_annealed_attention(model: Any) -> None:
    """Refuse a model to which annealing does not apply.

    Raises:
        ValueError: naming the setting and the remedy.
    """
    implementation = model.config._attn_implementation
    if implementation not in ANNEALED_ATTENTION:
        raise ValueError(
            f"attention_annealing_steps does not run with attn_implementation={implementation!r}, which takes no mask "
            f"of single entries. Load the model with one of {', '.join(ANNEALED_ATTENTION)}; once annealing is over, "
            "go on with another."
        )
    if isinstance(model, LLaDAModelLM | DreamModel):
        raise ValueError(
            f"attention_annealing_steps is for models trained to predict the next token; a {model.config.model_type} "
            "checkpoint was trained with attention in both directions, which annealing would take away. Remove it."
        )
