"""The sampler: one loop, and small functions for its choices.

State is a canvas of `max_new_tokens` masks after each prompt. In every step the network predicts all masked positions
of the active block, a token is proposed at each, and the most confident proposals are committed (LLaDA, algorithm 5,
with semi-autoregressive blocks; MaskGIT before it). Committed tokens are never changed.

Tokens are drawn by inverting the cumulative distribution in float64 with one uniform number a position. That is the
same distribution as LLaDA's `argmax(logits - T log(-log u))` with one Gumbel number a vocabulary entry, at a V-th of
the noise. Both must be float64: the largest Gumbel number that float32 uniforms can give is 16.6, which cuts the tail
of the distribution and so lowers its effective temperature (Zheng et al. 2024, arXiv 2409.02908).

Where other methods belong: caches in `predict_logits`, more branches of guidance in `predict_step`, an adaptive number
of tokens a step in `transfer_counts`, rules that mask committed tokens again after `Canvas.commit`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlm_tune.diffusion.classifier_guidance import ClassifierGuidance
from dlm_tune.diffusion.noise import NoiseStream, counter_uniform
from dlm_tune.generation.canvas import Canvas, make_canvas
from dlm_tune.generation.confidence import CONFIDENCE_FUNCTIONS
from dlm_tune.generation.config import DiffusionGenerationConfig, unknown_name
from dlm_tune.generation.guidance import StepLogits, make_guidance, predict_step, steer_step

# One float64 tensor of this many elements is 64 MiB; the largest step holds about three of them at a time.
_MAX_CHUNK_ELEMENTS = 2**23
_TOKEN_DRAW, _ORDER_DRAW = 0, 1

StepCallback = Callable[[int, int, Tensor], None]


@dataclass
class DiffusionGenerationOutput:
    """What `generate` returns.

    Attributes:
        sequences: `(B, P + max_new_tokens)` long: the prompts as given, then the new tokens. After the end-of-sequence
            token that ended a row come the model's padding tokens (that end-of-sequence token where it has none).
        num_forward_passes: calls of the model, each on the rows still running. Guidance makes one call a step on both
            branches, or two calls with `guidance_batching=False`.
        num_row_passes: rows that went through the model, summed over its calls: what generation cost. A row that is
            guided in a step counts twice.
        trace: `(B, max_new_tokens)` long, the step that committed each token, -1 after the end of a row (also where a
            token right of the end was committed before the row ended, and then discarded); None unless
            `return_trace`. Where it is not -1, the canvas after step k is `where(trace <= k, new tokens, mask)`.
    """

    sequences: Tensor
    num_forward_passes: int
    num_row_passes: int
    trace: Tensor | None = None


def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation_config: DiffusionGenerationConfig | None = None,
    *,
    row_keys: Tensor | None = None,
    guidance_scales: Tensor | None = None,
    negative_input_ids: Tensor | None = None,
    negative_attention_mask: Tensor | None = None,
    classifier: ClassifierGuidance | None = None,
    on_step: StepCallback | None = None,
    **overrides: Any,
) -> DiffusionGenerationOutput:
    """Generate `max_new_tokens` tokens after each prompt.

    A row's tokens depend on its prompt, the seed and its key only, not on the other rows of the batch.

    Args:
        model: called as `model(input_ids=, attention_mask=, position_mask=).logits`, the logits `(N, V)` at the `N`
            true positions of `position_mask`, and read for `.config`. Models of `dlm_tune.load_model`, also inside a
            `PeftModel`. It runs in evaluation mode, and modules in training mode return to it.
        input_ids: `(B, P)` prompts, padded on the left.
        attention_mask: `(B, P)`, 0 at padding; None when nothing is padded.
        generation_config: options; the defaults if None.
        row_keys: `(B,)` integers that key the noise of each row, by default its index. Pass data-set indices to make
            samples independent of how rows are batched.
        guidance_scales: `(B,)` guidance scale of each row, instead of `guidance_scale` of the configuration. Rows of
            scale 0 have no second branch.
        negative_input_ids: `(B, Q)` prompts to steer away from, padded on the left: the second branch of guidance sees
            them before the canvas instead of the masked prompts.
        negative_attention_mask: `(B, Q)`, 0 at their padding; None when nothing is padded.
        classifier: `log p(y | x)` that steers every step, also beside a guidance scale. It sees prompt and canvas, and
            knows the rows of the batch by their index.
        on_step: called as `on_step(step, block, sequences)` after each step, with the live `(B, P + max_new_tokens)`
            canvas, masks included; it must not be changed.
        **overrides: fields of the configuration that replace those of `generation_config`.

    Raises:
        ValueError: options or prompts that cannot be honoured.
        TypeError: an unknown option, a classifier that is no `ClassifierGuidance`, or a model without the
            `position_mask` mode.
    """
    config = with_overrides(generation_config or DiffusionGenerationConfig(), overrides)
    canvas = make_canvas(input_ids, attention_mask, config.max_new_tokens, model.config)
    row_keys = torch.arange(len(input_ids)) if row_keys is None else row_keys
    if row_keys.shape != input_ids.shape[:1]:
        raise ValueError(
            f"row_keys of shape {tuple(row_keys.shape)}: pass one integer for each of {len(input_ids)} rows."
        )
    row_keys = row_keys.to(input_ids.device)
    proposer = _Proposer.build(model.config, config, _eos_token_ids(model, config))
    guidance = make_guidance(
        model.config, config, canvas, guidance_scales, negative_input_ids, negative_attention_mask
    )
    num_forward_passes, num_row_passes = 0, 0
    # no_grad and not inference_mode: sequences may be scored with gradients afterwards.
    with torch.no_grad(), _evaluation_mode(model):
        for step, block, columns, counts in _plan(canvas, config):
            rows = (canvas.is_masked[:, columns].any(1) & (counts > 0)).nonzero().squeeze(1)
            if not len(rows):
                continue
            logits, num_calls, num_rows = predict_step(model, canvas, rows, columns, guidance)
            logits = steer_step(logits, canvas, rows, columns, classifier, proposer.forbidden_ids)
            _commit_best(logits, canvas, rows, columns, counts[rows], proposer, row_keys[rows], step)
            num_forward_passes, num_row_passes = num_forward_passes + num_calls, num_row_passes + num_rows
            if config.stop_at_eos and proposer.eos_token_ids:
                eos_token_ids = torch.tensor(proposer.eos_token_ids, device=input_ids.device)
                canvas.end_rows(eos_token_ids, _fill_token_id(model.config, proposer.eos_token_ids))
            if on_step is not None:
                on_step(step, block, canvas.tokens)
    return DiffusionGenerationOutput(
        canvas.tokens, num_forward_passes, num_row_passes, canvas.committed_at if config.return_trace else None
    )


def _plan(canvas: Canvas, config: DiffusionGenerationConfig) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Yield `(step, block, columns of the block, tokens to commit (B,))`, blocks from left to right."""
    block_length = config.block_length or config.max_new_tokens
    step = 0
    for block, block_steps in enumerate(config.block_steps):
        start = canvas.prompt_length + block * block_length
        columns = slice(start, start + block_length)
        for counts in transfer_counts(canvas.is_masked[:, columns].sum(1), block_steps).unbind(1):
            yield step, block, columns, counts
            step += 1


def transfer_counts(num_masked: Tensor, num_steps: int) -> Tensor:
    """Tokens to commit in each step: `(B, num_steps)`, rows sum to `num_masked` `(B,)`.

    `m // K` tokens a step, and one more in each of the first `m mod K` steps (LLaDA's `get_num_transfer_tokens`).
    """
    base, remainder = num_masked // num_steps, num_masked % num_steps
    return base[:, None] + (torch.arange(num_steps, device=num_masked.device) < remainder[:, None]).long()


def _commit_best(
    logits: StepLogits,
    canvas: Canvas,
    rows: Tensor,
    columns: slice,
    counts: Tensor,
    proposer: "_Proposer",
    row_keys: Tensor,
    step: int,
) -> None:
    """Proposals at the masked positions of the block, whose logits are given; the best `counts` are committed."""
    block_mask = canvas.is_masked[rows, columns]
    row, column = block_mask.nonzero(as_tuple=True)
    noise_keys = (row_keys[row], step, column + (columns.start - canvas.prompt_length))
    tokens, confidence = proposer.propose(logits, noise_keys)
    proposals = torch.zeros_like(block_mask, dtype=torch.long).masked_scatter(block_mask, tokens)
    ranking = torch.full(block_mask.shape, -torch.inf, dtype=torch.float64, device=block_mask.device)
    ranking = ranking.masked_scatter(block_mask, confidence)
    # Stable: equal confidences are committed from left to right on every device.
    rank = ranking.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    canvas.commit(rows, columns, block_mask & (rank < counts[:, None]), proposals, step)


@dataclass
class _Proposer:
    """Proposes a token and its confidence at each masked position."""

    config: DiffusionGenerationConfig
    forbidden_ids: list[int]
    eos_token_ids: list[int]

    @classmethod
    def build(cls, model_config: Any, config: DiffusionGenerationConfig, eos_token_ids: list[int]) -> "_Proposer":
        for name in ("suppress_eos", "suppress_eos_confidence"):
            if getattr(config, name) and not eos_token_ids:
                raise ValueError(
                    f"{name}=True, but neither eos_token_ids nor the model's config names an end-of-sequence token. "
                    "Set eos_token_ids."
                )
        forbidden = {model_config.mask_token_id, *(config.suppress_tokens or [])}
        forbidden.update(eos_token_ids if config.suppress_eos else [])
        return cls(config, sorted(forbidden), eos_token_ids)

    def propose(self, logits: StepLogits, noise_keys: tuple[Tensor | int, ...]) -> tuple[Tensor, Tensor]:
        """Tokens and confidences, `(N,)` long and float64, from logits `(N, V)` of any dtype."""
        if self.forbidden_ids[-1] >= logits.shape[-1]:
            raise ValueError(
                f"suppress_tokens or mask_token_id holds id {self.forbidden_ids[-1]}, but the model has "
                f"{logits.shape[-1]} logits. Use ids below that."
            )
        uniforms = [
            counter_uniform(self.config.seed, NoiseStream.SAMPLER, draw, *noise_keys)
            for draw in (_TOKEN_DRAW, _ORDER_DRAW)
        ]
        chunk = max(1, _MAX_CHUNK_ELEMENTS // logits.shape[-1])
        slices = [slice(start, start + chunk) for start in range(0, logits.shape[0], chunk)]
        parts = [self._propose_chunk(logits[rows], *(uniform[rows] for uniform in uniforms)) for rows in slices]
        tokens, confidence = (torch.cat(part) for part in zip(*parts, strict=True))
        if self.config.suppress_eos_confidence:
            is_eos = torch.isin(tokens, torch.tensor(self.eos_token_ids, device=tokens.device))
            confidence = confidence.masked_fill(is_eos, torch.finfo(confidence.dtype).min)
        return tokens, confidence

    def _propose_chunk(self, logits: Tensor, token_uniforms: Tensor, order_uniforms: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.double().index_fill(-1, torch.tensor(self.forbidden_ids, device=logits.device), -torch.inf)
        best = logits.argmax(-1)
        tokens = best
        if self.config.temperature > 0:
            tokens = draw_tokens((logits / self.config.temperature).softmax(-1), token_uniforms)
        ranked_tokens = tokens if self.config.confidence_from == "sampled" else best
        confidence = CONFIDENCE_FUNCTIONS[self.config.remasking]
        return tokens, confidence(logits.log_softmax(-1), ranked_tokens, order_uniforms)


def draw_tokens(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens `(N,)` from float64 `probs` `(N, V)` by inversion: the first `v` with `cumulative[v] > u * total`.

    An entry of probability 0 is never drawn.
    """
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)
    # A parallel prefix sum may decrease by a rounding error, so that the search could stop at a probability of 0.
    is_possible = probs.gather(-1, tokens[:, None]).squeeze(-1) > 0
    return torch.where(is_possible, tokens, probs.argmax(-1))


def with_overrides(config: DiffusionGenerationConfig, overrides: dict[str, Any]) -> DiffusionGenerationConfig:
    """The configuration with some fields replaced; an unknown name is a TypeError that gives the nearest one."""
    names = {field.name for field in dataclasses.fields(config)}
    for name in overrides:
        if name not in names:
            raise TypeError(unknown_name("generation option", name, names))
    return dataclasses.replace(config, **overrides)


def _eos_token_ids(model: Any, config: DiffusionGenerationConfig) -> list[int]:
    """The configured ids, or those of the model's generation config and config."""
    if config.eos_token_ids is not None:
        return sorted(set(config.eos_token_ids))
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config):
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return sorted(found)


def _fill_token_id(model_config: Any, eos_token_ids: list[int]) -> int:
    pad_token_id = getattr(model_config, "pad_token_id", None)
    return eos_token_ids[0] if pad_token_id in (None, model_config.mask_token_id) else pad_token_id


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode inside; afterwards exactly the modules that were training train again."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
