"""One forward with three modes, shared by every diffusion language model class of this package."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.utils import ModelOutput

from dlm_tune.models.distillation import GuidedTargets, score_against_teacher
from dlm_tune.models.documents import document_attention, document_position_ids
from dlm_tune.models.lm_head import project_positions, score_targets


@dataclass
class MaskedTokenScores(ModelOutput):
    """Scores of the selected positions, in row-major order of `target_mask`.

    Attributes:
        loss: scalar float32, sum of `target_weights` times `token_nll`, or times the divergence from a guided teacher;
            differentiable. Only with `target_weights`.
        token_nll: (N,) float32, -log p(target) in nats; differentiable, but not where `target_weights` are given.
        is_top1: (N,) bool, whether the target has the largest logit.
    """

    loss: Tensor | None = None
    token_nll: Tensor | None = None
    is_top1: Tensor | None = None


class DiffusionMixin:
    """Adds masked-diffusion forward modes to a `*ForCausalLM` class whose attention is bidirectional."""

    config: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: None = None,
        use_cache: bool | None = None,
        target_ids: Tensor | None = None,
        target_mask: Tensor | None = None,
        target_weights: Tensor | None = None,
        guided_targets: GuidedTargets | None = None,
        position_mask: Tensor | None = None,
        wants_hidden: bool = False,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model in one of three modes.

        Args:
            input_ids: (B, L) tokens, the noisy ones in training.
            attention_mask: (B, L), 1 where a token is attended; or (B, 1, L, L), True where query attends to key.
            position_ids: (B, L); by default each row counts from its first attended token, so that left and right
                padding give the logits of the unpadded row. Beside a 4D mask they tell by a 0 where a row begins.
            inputs_embeds: (B, L, D) instead of `input_ids`.
            labels: must be None; the causal loss shifts them and scores every position.
            use_cache: keep keys and values; default False, since bidirectional attention changes them at every step.
            target_ids: (B, L) clean tokens, read where `target_mask` is True.
            target_mask: (B, L) bool, positions to score.
            target_weights: (B, L) float, read where `target_mask` is True: asks for the weighted sum of the scores as
                `loss`, whose gradient is computed in the forward pass (nothing of size V is kept or recomputed).
            guided_targets: of a teacher, one row for each True of `target_mask`: `loss` is then the weighted sum of
                KL(p_guided || p_model); see `models.distillation`.
            position_mask: (B, L) bool, positions whose logits are wanted.
            wants_hidden: with `position_mask`, the hidden states that predict the positions instead of their logits.
            document_ids: (B, L) long instead of `attention_mask` and `position_ids`, for packed rows: tokens attend
                only to tokens of the same id, positions restart with each document, 0 marks padding. The tokens of a
                document are contiguous.
            **kwargs: passed on to the transformer.

        Returns:
            Without `target_mask` and `position_mask`: what the transformers class returns, raw logits (B, L, V) before
            any shift. With `position_mask`: `.logits` (N, V) after `config.logits_shift`, or `.last_hidden_state`
            (N, D) before the head. With `target_mask` and `target_ids`: MaskedTokenScores. The LM head is applied to
            the selected positions only.

        Raises:
            ValueError: on `labels`, on inconsistent arguments or shapes.
        """
        _check_modes(labels, target_ids, target_mask, target_weights, guided_targets, position_mask, wants_hidden)
        layout = _layout(self, attention_mask, position_ids, document_ids)
        attention_mask, position_ids, first_columns, attention_kwargs = layout
        kwargs |= attention_kwargs
        attention_mask = _additive_if_eager(attention_mask, self)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": bool(use_cache),
        }
        selection = position_mask if target_mask is None else target_mask
        if selection is None:
            return super().forward(**inputs, **kwargs)  # type: ignore[misc]
        for name in ("return_dict", "logits_to_keep"):
            kwargs.pop(name, None)
        hidden = self.model(**inputs, **kwargs).last_hidden_state  # type: ignore[attr-defined]
        selected = select_hidden(hidden, selection, first_columns, self.config.logits_shift)  # type: ignore[attr-defined]
        if wants_hidden:
            return BaseModelOutput(last_hidden_state=selected)
        head = self.get_output_embeddings()  # type: ignore[attr-defined]
        softcap = getattr(self.config, "final_logit_softcapping", None)
        if target_mask is None:
            return CausalLMOutput(logits=project_positions(head, selected, softcap))
        assert target_ids is not None
        weights = None if target_weights is None else target_weights[target_mask]
        score = score_targets
        if guided_targets is not None:
            score = partial(score_against_teacher, guided=guided_targets, mask_token_id=self.config.mask_token_id)
        loss, token_nll, is_top1 = score(
            head,
            selected,
            target_ids[target_mask],
            token_weights=weights,
            vocab_size=self.config.vocab_size,
            logit_softcap=softcap,
        )
        return MaskedTokenScores(loss=loss, token_nll=token_nll, is_top1=is_top1)

    def predict_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return (N, V) logits of the positions where `position_mask` (B, L) is True, `logits_shift` applied."""
        outputs = self(input_ids=input_ids, attention_mask=attention_mask, position_mask=position_mask, **kwargs)  # type: ignore[operator]
        return outputs.logits

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Sample by iterative unmasking; see `dlm_tune.generate`."""
        from dlm_tune.generation import generate

        return generate(self, input_ids, attention_mask, generation_config, **kwargs)


def padded_position_ids(attention_mask: Tensor) -> Tensor:
    """Return (B, L) positions counted from each row's first attended token; padding before it gets 0."""
    length = attention_mask.shape[1]
    first = attention_mask.bool().int().argmax(dim=1, keepdim=True)
    return (torch.arange(length, device=attention_mask.device) - first).clamp(min=0)


def select_hidden(hidden: Tensor, selection: Tensor, is_first: Tensor | None, logits_shift: bool) -> Tensor:
    """Return the (N, D) hidden states that predict the selected positions, in row-major order.

    With `logits_shift` the predictor of position i is i - 1, as in models initialised from next-token prediction; the
    first token of a row, or of a packed document, has no predecessor and keeps its own state, as in Dream's sampler.

    Args:
        hidden: (B, L, D).
        selection: (B, L), true at the selected positions.
        is_first: (B, L) bool, first tokens (and padding before them) beside those of column 0; None for no others.
        logits_shift: whether logits are shifted right by one.
    """
    if hidden.shape[:2] != selection.shape:
        raise ValueError(
            f"the selection mask has shape {tuple(selection.shape)} but the model returned hidden states for "
            f"{tuple(hidden.shape[:2])}; give a mask of input_ids' shape, and use no prompt-learning adapter (it "
            "prepends virtual tokens)"
        )
    if not logits_shift:
        return hidden[selection.bool()]
    rows, columns = selection.nonzero(as_tuple=True)
    keeps_own = columns == 0
    if is_first is not None:
        keeps_own = keeps_own | is_first.expand_as(selection)[rows, columns]
    return hidden[rows, torch.where(keeps_own, columns, columns - 1)]


def _layout(
    model: Any, attention_mask: Tensor | None, position_ids: Tensor | None, document_ids: Tensor | None
) -> tuple[Any, Tensor | None, Tensor | None, dict[str, Any]]:
    """Attention mask, positions, where rows or documents begin, and further arguments of the transformer."""
    if document_ids is not None:
        if attention_mask is not None or position_ids is not None:
            raise ValueError("document_ids stand for attention_mask and position_ids: give one or the other")
        position_ids = document_position_ids(document_ids)
        attention_mask, kwargs = document_attention(document_ids, model)
        return attention_mask, position_ids, position_ids == 0, kwargs
    if attention_mask is not None and attention_mask.dim() == 2:
        padded = padded_position_ids(attention_mask)
        return attention_mask, padded if position_ids is None else position_ids, padded == 0, {}
    return attention_mask, position_ids, None if position_ids is None else position_ids == 0, {}


def _check_modes(
    labels: Any,
    target_ids: Any,
    target_mask: Any,
    target_weights: Any,
    guided_targets: Any,
    position_mask: Any,
    wants_hidden: bool,
) -> None:
    if labels is not None:
        raise ValueError(
            "labels were given, but their loss is the causal one (shifted, at every position), which is wrong for a "
            "diffusion model; pass target_ids and target_mask instead"
        )
    if (target_ids is None) != (target_mask is None):
        raise ValueError("target_ids and target_mask belong together: give both, or neither")
    if target_weights is not None and target_mask is None:
        raise ValueError("target_weights weigh the scores of target_ids at target_mask: give these too")
    if guided_targets is not None and target_weights is None:
        raise ValueError("guided_targets stand for the targets of a weighted loss: give target_weights too")
    if target_mask is not None and position_mask is not None:
        raise ValueError("target_mask (scores) and position_mask (logits) are two modes of the forward; give one")
    if wants_hidden and position_mask is None:
        raise ValueError("wants_hidden asks for the hidden states at position_mask: give it too")


def _additive_if_eager(attention_mask: Tensor | None, model: Any) -> Tensor | None:
    """Eager attention adds its mask to the scores, so a boolean 4D mask would pass for a bias of 0 and 1."""
    if model.config._attn_implementation != "eager" or attention_mask is None:
        return attention_mask
    if attention_mask.dim() != 4 or attention_mask.dtype != torch.bool:
        return attention_mask
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device).masked_fill(
        ~attention_mask, torch.finfo(dtype).min
    )
