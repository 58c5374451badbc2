"""Classifier-free guidance in the sampler: what its two branches see, and when and how they are combined.

The conditional branch is the canvas after its prompt. The second branch is the same canvas after the masked prompt, as
`dlm_tune.diffusion.mask_prompt` masks it in training too, or after a negative prompt.
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_tune.diffusion.classifier_guidance import ClassifierGuidance, classifier_guided_logits
from dlm_tune.diffusion.guidance import guidance_keep_token_ids, guided_logits, mask_prompt
from dlm_tune.generation.canvas import Canvas, make_canvas
from dlm_tune.generation.config import DiffusionGenerationConfig

logger = logging.getLogger(__name__)


class StepLogits(Protocol):
    """Logits `(N, V)` at the masked positions of a step: a tensor, or `GuidedLogits`."""

    @property
    def shape(self) -> torch.Size:
        """`(N, V)`."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Logits of some positions; `[:]` gives all."""


@dataclass
class GuidedLogits:
    """Logits `(N, V)` of two branches, combined where and when they are read: no third `(N, V)` tensor is kept.

    Attributes:
        cond: `(N, V)`.
        other: `(M, V)` of the second branch, at those of the `N` positions that are guided.
        scales: `(N,)` w of each position, 0 where it is not guided.
    """

    cond: Tensor
    other: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        self._is_guided = self.scales != 0
        self._places = self._is_guided.cumsum(0) - 1
        # One number where all are the same: a fast path for the usual case.
        self._common = float(self.scales[0]) if bool((self.scales == self.scales[0]).all()) else None

    @property
    def shape(self) -> torch.Size:
        """`(N, V)`."""
        return self.cond.shape

    def __getitem__(self, rows: slice) -> Tensor:
        """Guided logits of some positions, float32 (float64 if a branch is); unguided positions as they are."""
        if self._common is not None:
            return guided_logits(self.cond[rows], self.other[rows], self._common)
        is_guided = self._is_guided[rows]
        places = self._places[rows][is_guided]
        guided = guided_logits(self.cond[rows][is_guided], self.other[places], self.scales[rows][is_guided])
        logits = self.cond[rows].to(guided.dtype, copy=True)
        logits[is_guided] = guided
        return logits


@dataclass
class BranchInputs:
    """One branch of a step: ids `(R, T)`, their attention mask, and the positions whose logits are wanted."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_mask: Tensor

    def pad_left(self, length: int, *, needs_attention_mask: bool) -> "BranchInputs":
        """The same rows at `length` positions; padding is never attended."""
        padding = length - self.input_ids.shape[1]
        attention_mask = self.attention_mask
        if attention_mask is None and (padding or needs_attention_mask):
            attention_mask = torch.ones_like(self.input_ids)
        if not padding:
            return BranchInputs(self.input_ids, attention_mask, self.position_mask)
        input_ids, attention_mask, position_mask = (
            F.pad(x, (padding, 0)) for x in (self.input_ids, attention_mask, self.position_mask) if x is not None
        )
        return BranchInputs(input_ids, attention_mask, position_mask)


@dataclass
class Guidance:
    """Guidance of `B` rows.

    Attributes:
        config: schedule and batching.
        scales: `(B,)` float64, w of each row, 0 where a row has nothing to hide.
        prompt_ids: `(B, Q)` prompts of the second branch, left-padded.
        attention_mask: `(B, Q + C)` of the second branch, or None when no row is padded.
    """

    config: DiffusionGenerationConfig
    scales: Tensor
    prompt_ids: Tensor
    attention_mask: Tensor | None

    def inputs(self, canvas: Canvas, rows: Tensor, columns: slice) -> BranchInputs:
        """The second branch of `rows` `(R,)` for the block `columns` of the canvas."""
        input_ids = torch.cat([self.prompt_ids[rows], canvas.tokens[rows, canvas.prompt_length :]], dim=1)
        offset = self.prompt_ids.shape[1] - canvas.prompt_length
        position_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        position_mask[:, columns.start + offset : columns.stop + offset] = canvas.is_masked[rows, columns]
        return BranchInputs(
            input_ids, None if self.attention_mask is None else self.attention_mask[rows], position_mask
        )

    def step_scales(self, canvas: Canvas, rows: Tensor) -> Tensor:
        """`(R,)` w of `rows` `(R,)` in this step, by the schedule."""
        scales = self.scales[rows]
        if self.config.guidance_schedule == "constant":
            return scales
        is_committed = ~canvas.is_masked[rows, canvas.prompt_length :]
        committed_share = is_committed.sum(1).double() / is_committed.shape[1]
        if self.config.guidance_schedule == "linear":
            return scales * committed_share
        start, end = self.config.guidance_interval or (0.0, 1.0)
        return scales.where((committed_share >= start) & (committed_share < end), 0.0)


def make_guidance(
    model_config: Any,
    config: DiffusionGenerationConfig,
    canvas: Canvas,
    guidance_scales: Tensor | None = None,
    negative_input_ids: Tensor | None = None,
    negative_attention_mask: Tensor | None = None,
) -> Guidance | None:
    """The guidance that was asked for, or None for none.

    Args:
        model_config: gives `mask_token_id` and `guidance_keep_token_ids`.
        config: options.
        canvas: the prompts, checked.
        guidance_scales: `(B,)` w of each row instead of `config.guidance_scale`.
        negative_input_ids: `(B, Q)` prompts of the second branch instead of the masked prompts.
        negative_attention_mask: `(B, Q)`, 0 at padding, or None.

    Raises:
        ValueError: options without effect, scales or negative prompts that do not fit the rows, or no row in which
            `config.guidance_scale` has a prompt to hide.
    """
    tokens = canvas.tokens
    config.check_guidance(has_row_scales=guidance_scales is not None)
    if guidance_scales is None:
        scales = torch.full(tokens.shape[:1], float(config.guidance_scale), dtype=torch.float64, device=tokens.device)
    else:
        scales = _check_scales(guidance_scales, len(tokens)).to(device=tokens.device, dtype=torch.float64)
    if negative_input_ids is None and negative_attention_mask is not None:
        raise ValueError("negative_attention_mask belongs to negative_input_ids, which were not given. Pass both.")
    if negative_input_ids is not None and guidance_scales is None and config.guidance_scale == 0:
        raise ValueError(
            "negative_input_ids have no effect with guidance_scale=0. Set guidance_scale, for example to 1."
        )
    if not bool((scales != 0).any()):
        return None
    if getattr(model_config, "guidance_distillation_scale", None) is not None:
        logger.warning(
            "This model was distilled from a teacher guided at %s (config.guidance_distillation_scale): guiding it "
            "again tilts its answers twice. Use guidance_scale=0.",
            model_config.guidance_distillation_scale,
        )
    if negative_input_ids is not None:
        negative = _negative_canvas(negative_input_ids, negative_attention_mask, canvas, model_config)
        return Guidance(config, scales, negative.tokens[:, : negative.prompt_length], negative.attention_mask)
    prompts = tokens[:, : canvas.prompt_length]
    is_prompt = torch.ones_like(prompts, dtype=torch.bool)
    if canvas.attention_mask is not None:
        is_prompt = canvas.attention_mask[:, : canvas.prompt_length].bool()
    hidden = mask_prompt(prompts, is_prompt, model_config.mask_token_id, guidance_keep_token_ids(model_config))
    # Branches that see the same agree, whatever the scale.
    differs = (hidden != prompts).any(1)
    if guidance_scales is None and not bool(differs.any()):
        raise _nothing_to_hide(config)
    return Guidance(config, scales.where(differs, 0.0), hidden, canvas.attention_mask)


def check_prompts(model_config: Any, config: DiffusionGenerationConfig, prompts: Iterable[Collection[int]]) -> None:
    """Refuse guidance that no prompt of several batches, token ids, could be given (see `row_scales`)."""
    kept = set(guidance_keep_token_ids(model_config))
    if config.guidance_scale != 0 and not any(set(prompt) - kept for prompt in prompts):
        raise _nothing_to_hide(config)


def _nothing_to_hide(config: DiffusionGenerationConfig) -> ValueError:
    return ValueError(
        f"guidance_scale={config.guidance_scale} cannot guide: the prompts are empty or hold kept tokens only, so "
        "that the unconditional branch sees what the conditional one sees. Give prompts, negative prompts, or "
        "guidance_scale=0."
    )


def row_scales(config: DiffusionGenerationConfig, num_rows: int) -> Tensor | None:
    """The configured scale, row by row: for one batch of several, which may happen to hold no prompt to hide."""
    return torch.full((num_rows,), config.guidance_scale, dtype=torch.float64) if config.guidance_scale else None


def _check_scales(guidance_scales: Tensor, num_rows: int) -> Tensor:
    if not isinstance(guidance_scales, Tensor) or guidance_scales.shape != (num_rows,):
        found = tuple(guidance_scales.shape) if isinstance(guidance_scales, Tensor) else type(guidance_scales).__name__
        raise ValueError(f"guidance_scales of shape {found}: pass a tensor of one number for each of {num_rows} rows.")
    if not bool(guidance_scales.isfinite().all()):
        raise ValueError(f"guidance_scales={guidance_scales.tolist()} must be finite numbers; 0 is no guidance.")
    return guidance_scales


def _negative_canvas(input_ids: Tensor, attention_mask: Tensor | None, canvas: Canvas, model_config: Any) -> Canvas:
    """A canvas of the same length behind the negative prompts, checked as prompts are."""
    num_rows, length = canvas.tokens.shape
    try:
        negative = make_canvas(input_ids, attention_mask, length - canvas.prompt_length, model_config)
    except ValueError as error:
        raise ValueError(f"negative prompts: {error}") from error
    if len(negative.tokens) != num_rows:
        raise ValueError(
            f"negative_input_ids hold {len(negative.tokens)} rows for {num_rows} prompts: give each prompt its own, "
            "or repeat one with negative_input_ids.expand(rows, -1)."
        )
    return negative


def predict_step(
    model: Any, canvas: Canvas, rows: Tensor, columns: slice, guidance: Guidance | None
) -> tuple[StepLogits, int, int]:
    """Logits at the masked positions of a block, guided where asked for.

    Args:
        model: as `generate`.
        canvas: the state.
        rows: `(R,)` rows to compute.
        columns: the block.
        guidance: of all rows, or None.

    Returns:
        Logits `(N, V)` at the `N` masked positions, in row-major order; calls of the model; rows in these calls.
    """
    attention_mask = None if canvas.attention_mask is None else canvas.attention_mask[rows]
    cond = BranchInputs(canvas.tokens[rows], attention_mask, _wanted_positions(canvas, rows, columns))
    scales = None if guidance is None else guidance.step_scales(canvas, rows)
    if guidance is None or scales is None or not bool((scales != 0).any()):
        return predict_logits(model, cond), 1, len(rows)
    guided_rows = rows[scales != 0]
    other = guidance.inputs(canvas, guided_rows, columns)
    position_scales = scales[canvas.is_masked[rows, columns].nonzero()[:, 0]]
    num_rows = len(rows) + len(guided_rows)
    if not guidance.config.guidance_batching:
        return GuidedLogits(predict_logits(model, cond), predict_logits(model, other), position_scales), 2, num_rows
    logits = predict_logits(model, _stack(cond, other))
    num_positions = len(position_scales)
    return GuidedLogits(logits[:num_positions], logits[num_positions:], position_scales), 1, num_rows


def steer_step(
    logits: StepLogits,
    canvas: Canvas,
    rows: Tensor,
    columns: slice,
    classifier: ClassifierGuidance | None,
    forbidden_ids: list[int],
) -> StepLogits:
    """The logits of `predict_step`, tilted by the classifier if there is one.

    Raises:
        TypeError: a classifier that is no `ClassifierGuidance`.
        ValueError: scores that cannot guide.
    """
    if classifier is None:
        return logits
    if not isinstance(classifier, ClassifierGuidance):
        raise TypeError(
            f"classifier is a {type(classifier).__name__}: pass ClassifierGuidance(log_prob, scale=...), whose "
            "log_prob gives log p(y | x)."
        )
    return classifier_guided_logits(
        logits[:],
        canvas.tokens[rows],
        _wanted_positions(canvas, rows, columns),
        classifier,
        attention_mask=None if canvas.attention_mask is None else canvas.attention_mask[rows],
        rows=rows,
        forbidden_ids=forbidden_ids,
    )


def _wanted_positions(canvas: Canvas, rows: Tensor, columns: slice) -> Tensor:
    """`(R, T)` bool, the masked positions of a block."""
    position_mask = torch.zeros_like(canvas.is_masked[rows])
    position_mask[:, columns] = canvas.is_masked[rows, columns]
    return position_mask


def _stack(*branches: BranchInputs) -> BranchInputs:
    """Both branches as rows of one batch, padded on the left to one length."""
    length = max(branch.input_ids.shape[1] for branch in branches)
    needs_attention_mask = any(
        branch.attention_mask is not None or branch.input_ids.shape[1] < length for branch in branches
    )
    padded = [branch.pad_left(length, needs_attention_mask=needs_attention_mask) for branch in branches]
    return BranchInputs(
        torch.cat([branch.input_ids for branch in padded]),
        torch.cat([b.attention_mask for b in padded if b.attention_mask is not None])
        if needs_attention_mask
        else None,
        torch.cat([branch.position_mask for branch in padded]),
    )


def predict_logits(model: Any, inputs: BranchInputs) -> Tensor:
    """Logits `(N, V)` at the `N` wanted positions, in row-major order."""
    logits = model(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, position_mask=inputs.position_mask
    ).logits
    if logits.ndim != 2:
        raise TypeError(
            f"{type(model).__name__} returned logits of shape {tuple(logits.shape)} and so ignores position_mask: "
            "it is not a diffusion language model of dlm_tune. Load it with dlm_tune.load_model."
        )
    return logits
