"""Options of the sampler, checked together before anything runs."""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

REMASKING_RULES = ("entropy", "low_confidence", "margin", "random")
CONFIDENCE_SOURCES = ("predictive", "sampled")
GUIDANCE_SCHEDULES = ("constant", "interval", "linear")


@dataclass
class DiffusionGenerationConfig:
    """Options of `generate`.

    The defaults are LLaDA's sampler with blocks of 32 tokens and one token a step.

    Parameters:
        max_new_tokens: length of the canvas of masks that follows each prompt.
        steps: denoising steps over the whole canvas, shared evenly between blocks (earlier blocks get the remainder).
            A step that would commit no token is not run, so there are at most `max_new_tokens` of them.
        block_length: the canvas is filled block by block, left to right, as in LLaDA's semi-autoregressive decoding;
            `None` is one block. It must divide `max_new_tokens`.
        remasking: which of the proposed tokens are kept in a step (the others stay masked): those with the highest
            `low_confidence` (probability of the token), `margin` (best minus second best probability), `entropy`
            (lowest entropy first), or a `random` choice.
        confidence_from: with `low_confidence`, rank a position by the probability of the token `sampled` there (LLaDA)
            or by the highest `predictive` probability. They differ only at `temperature > 0`, where `sampled` is not a
            sampler of the model's distribution, even at one token a step, and `predictive` is.
        temperature: 0 takes the most probable token, otherwise tokens are drawn from `softmax(logits / temperature)`.
        stop_at_eos: a row ends at its first end-of-sequence token; what follows is padding and is not computed.
        eos_token_ids: the tokens that end a row; `None` takes those of the model's generation config and config.
        suppress_eos: never propose an end-of-sequence token (LLaDA's `logits_eos_inf`).
        suppress_eos_confidence: commit a proposed end-of-sequence token only when nothing else is left in its block
            (LLaDA's `confidence_eos_eot_inf`, at every temperature and without changing other confidences).
        suppress_tokens: token ids that are never proposed, for instance rows of the embedding without a token. The
            mask token never is.
        guidance_scale: w of classifier-free guidance. Tokens follow `p_cond^(1 + w) p_uncond^(-w)`, normalised, where
            the unconditional branch sees the prompt masked. 0 is no guidance and costs nothing, more follows the
            prompt more, -1 ignores it. A guided step computes twice the rows.
        guidance_schedule: how w depends on the share of the canvas that is committed: `constant`; `linear`, w times
            the share (Muse, arXiv 2301.00704, section 2.7); or `interval`, w while the share lies in
            `guidance_interval` and no second branch elsewhere (Kynkaanniemi et al., arXiv 2404.07724).
        guidance_interval: `[start, end)` of the schedule `interval`, within 0 and 1.
        guidance_batching: both branches as rows of one forward pass; otherwise two passes, of half the memory.
        seed: key of the noise; equal seeds give equal output, whatever else is in the batch.
        return_trace: also return the step at which each token was committed.

    Raises:
        ValueError: all faults at once, each with field, value, reason and remedy.
    """

    max_new_tokens: int = field(default=128, metadata={"help": "Number of tokens to generate after each prompt."})
    steps: int = field(default=128, metadata={"help": "Denoising steps over the whole canvas (at most one a token)."})
    block_length: int | None = field(
        default=32, metadata={"help": "Blocks are filled left to right; null is one block. Divides max_new_tokens."}
    )
    remasking: str = field(
        default="low_confidence",
        metadata={"help": "Rule for the tokens kept in a step.", "choices": list(REMASKING_RULES)},
    )
    confidence_from: str = field(
        default="sampled",
        metadata={
            "help": "low_confidence ranks by the sampled token (LLaDA) or by the most probable one (unbiased).",
            "choices": list(CONFIDENCE_SOURCES),
        },
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy; else softmax(logits / temperature)."})
    stop_at_eos: bool = field(default=True, metadata={"help": "End a row at its first end-of-sequence token."})
    eos_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Token ids that end a row; null takes those of the model."}
    )
    suppress_eos: bool = field(default=False, metadata={"help": "Never propose an end-of-sequence token."})
    suppress_eos_confidence: bool = field(
        default=False, metadata={"help": "Commit end-of-sequence tokens last in their block."}
    )
    suppress_tokens: list[int] | None = field(default=None, metadata={"help": "Token ids never proposed."})
    guidance_scale: float = field(
        default=0.0, metadata={"help": "w of classifier-free guidance; 0 is none, more follows the prompt more."}
    )
    guidance_schedule: str = field(
        default="constant",
        metadata={
            "help": "w over the committed share of the canvas: constant, rising from 0, or inside guidance_interval.",
            "choices": list(GUIDANCE_SCHEDULES),
        },
    )
    guidance_interval: list[float] | None = field(
        default=None,
        metadata={"help": "Start and end of guidance with guidance_schedule interval, as committed shares."},
    )
    guidance_batching: bool = field(
        default=True, metadata={"help": "Both branches of guidance in one pass; false is two, of half the memory."}
    )
    seed: int = field(default=0, metadata={"help": "Key of the sampling noise."})
    return_trace: bool = field(default=False, metadata={"help": "Return the step at which each token was committed."})

    def __post_init__(self) -> None:
        problems = [*self._type_problems()]
        if not problems:
            problems = [*self._length_problems(), *self._rule_problems(), *self._guidance_problems()]
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise ValueError(f"{count} in DiffusionGenerationConfig:\n  " + "\n  ".join(problems))

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the canvas."""
        return self.max_new_tokens // (self.block_length or self.max_new_tokens)

    @property
    def block_steps(self) -> list[int]:
        """Steps of each block: `steps` shared out, the first blocks get the remainder; never more than its tokens."""
        base, remainder = divmod(self.steps, self.num_blocks)
        length = self.max_new_tokens // self.num_blocks
        return [min(base + (block < remainder), length) for block in range(self.num_blocks)]

    def _type_problems(self) -> Iterable[str]:
        expected: list[tuple[str, Callable[[object], bool], str]] = [
            *((name, _is_int, "an integer") for name in ("max_new_tokens", "steps", "seed")),
            ("block_length", lambda value: value is None or _is_int(value), "an integer or null"),
            *((name, _is_number, "a number") for name in ("temperature", "guidance_scale")),
            *((name, lambda value: isinstance(value, str), "a name") for name in _NAMES),
            *((name, lambda value: isinstance(value, bool), "true or false") for name in _BOOLEANS),
            *((name, _is_token_list, "a list of token ids, or null") for name in ("eos_token_ids", "suppress_tokens")),
            ("guidance_interval", _is_pair, "two numbers, the start and the end, or null"),
        ]
        for name, is_valid, description in expected:
            value = getattr(self, name)
            if not is_valid(value):
                yield f"{name}={value!r} must be {description}."

    def _length_problems(self) -> Iterable[str]:
        if self.max_new_tokens < 1:
            yield f"max_new_tokens={self.max_new_tokens} leaves nothing to generate. Use 1 or more."
        elif self.block_length is not None and self.block_length < 1:
            yield f"block_length={self.block_length} is not a length. Use 1 or more, or null for one block."
        elif self.max_new_tokens % (self.block_length or 1):
            yield (
                f"block_length={self.block_length} does not divide max_new_tokens={self.max_new_tokens}: "
                f"blocks are filled whole. Use {_divisible_values(self.max_new_tokens, self.block_length or 1)}."
            )
        elif self.steps < self.num_blocks:
            yield (
                f"steps={self.steps} is fewer than the {self.num_blocks} blocks of the canvas: each block needs a "
                f"step. Use steps={self.num_blocks} or more, or a larger block_length."
            )

    def _rule_problems(self) -> Iterable[str]:
        if self.remasking not in REMASKING_RULES:
            yield unknown_name("remasking", self.remasking, REMASKING_RULES)
        if self.confidence_from not in CONFIDENCE_SOURCES:
            yield unknown_name("confidence_from", self.confidence_from, CONFIDENCE_SOURCES)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            yield f"temperature={self.temperature} cannot divide logits. Use 0 for greedy decoding, or more."
        if self.suppress_eos and self.suppress_eos_confidence:
            yield (
                "suppress_eos_confidence=True has no effect with suppress_eos=True, which never proposes "
                "end-of-sequence tokens. Set one of the two."
            )

    def _guidance_problems(self) -> Iterable[str]:
        if not math.isfinite(self.guidance_scale):
            yield f"guidance_scale={self.guidance_scale} is no power of a probability. Use a finite number; 0 is none."
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            yield unknown_name("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        if self.guidance_interval is None:
            return
        start, end = self.guidance_interval
        if not 0 <= start < end <= 1:
            yield (
                f"guidance_interval={self.guidance_interval} holds no committed share of the canvas. Use two numbers "
                "with 0 <= start < end <= 1, for example [0.2, 0.8]."
            )
        if self.guidance_schedule != "interval":
            yield (
                f"guidance_interval={self.guidance_interval} has no effect with guidance_schedule="
                f"'{self.guidance_schedule}'. Set guidance_schedule='interval', or leave the interval out."
            )

    def check_guidance(self, *, has_row_scales: bool = False) -> None:
        """Check what only a whole set of options can tell; `generate` does, and commands before they load a model.

        Args:
            has_row_scales: guidance scales are given row by row, instead of `guidance_scale`.

        Raises:
            ValueError: options of guidance without effect, a schedule without its interval, or one that guides no
                step.
        """
        if self.guidance_schedule == "interval" and self.guidance_interval is None:
            raise ValueError(
                "guidance_schedule='interval' needs guidance_interval, the committed shares between which to guide, "
                "for example [0.2, 0.8]."
            )
        if has_row_scales or self.guidance_scale != 0:
            self._check_schedule()
            return
        for name in ("guidance_schedule", "guidance_interval", "guidance_batching"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default:
                raise ValueError(
                    f"{name}={value!r} has no effect with guidance_scale=0. Set guidance_scale, for example to 1, or "
                    f"leave {name} at {default!r}."
                )

    def _check_schedule(self) -> None:
        start, end = (0.0, 1.0) if self.guidance_interval is None else self.guidance_interval
        shares = self._committed_shares()
        if self.guidance_schedule == "linear" and not any(shares):
            raise ValueError(
                f"guidance_schedule='linear' guides no step: w is 0 in the first step, and steps={self.steps} with "
                f"max_new_tokens={self.max_new_tokens} makes one. Use 2 or more, or guidance_schedule='constant'."
            )
        if self.guidance_schedule == "interval" and not any(start <= share < end for share in shares):
            raise ValueError(
                f"guidance_interval={self.guidance_interval} holds none of the {len(shares)} steps, which begin at "
                f"committed shares of {', '.join(f'{share:.3g}' for share in shares[:8])}"
                f"{', ...' if len(shares) > 8 else ''}. Widen the interval, or raise steps={self.steps}."
            )

    def _committed_shares(self) -> list[float]:
        """Share of the canvas that is committed before each step."""
        length = self.block_length or self.max_new_tokens
        shares = []
        for block, num_steps in enumerate(self.block_steps):
            tokens, extra = divmod(length, num_steps)  # as in `transfer_counts`
            committed = (block * length + step * tokens + min(step, extra) for step in range(num_steps))
            shares += [count / self.max_new_tokens for count in committed]
        return shares


_NAMES = ("remasking", "confidence_from", "guidance_schedule")
_BOOLEANS = ("stop_at_eos", "suppress_eos", "suppress_eos_confidence", "guidance_batching", "return_trace")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_pair(value: object) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)))


def _is_token_list(value: object) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(_is_int(item) and item >= 0 for item in value))


def _divisible_values(max_new_tokens: int, block_length: int) -> str:
    """The nearest values of either field that would divide: `block_length=16 or 32, or max_new_tokens=120`."""
    divisors = [size for size in range(1, max_new_tokens + 1) if max_new_tokens % size == 0]
    below = [size for size in divisors if size < block_length][-1:]
    above = [size for size in divisors if size > block_length][:1]
    rounded = max(block_length, max_new_tokens // block_length * block_length)
    return f"block_length={' or '.join(map(str, below + above))}, or max_new_tokens={rounded}"


def unknown_name(name: str, value: str, choices: Iterable[str]) -> str:
    """Sentence for a name that is not among `choices`, with the nearest one."""
    choices = sorted(choices)
    listed = ", ".join(repr(choice) for choice in choices[:-1]) + f" or {choices[-1]!r}"
    nearest = difflib.get_close_matches(value, choices, n=1)
    return f"unknown {name} {value!r}: choose {listed}." + (f" Did you mean {nearest[0]!r}?" if nearest else "")
