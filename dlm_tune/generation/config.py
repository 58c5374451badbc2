"""Options of the sampler, checked together before anything runs."""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

REMASKING_RULES = ("entropy", "low_confidence", "margin", "random")
CONFIDENCE_SOURCES = ("predictive", "sampled")


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
    seed: int = field(default=0, metadata={"help": "Key of the sampling noise."})
    return_trace: bool = field(default=False, metadata={"help": "Return the step at which each token was committed."})

    def __post_init__(self) -> None:
        problems = [*self._type_problems()]
        if not problems:
            problems = [*self._length_problems(), *self._rule_problems()]
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise ValueError(f"{count} in DiffusionGenerationConfig:\n  " + "\n  ".join(problems))

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the canvas."""
        return self.max_new_tokens // (self.block_length or self.max_new_tokens)

    def _type_problems(self) -> Iterable[str]:
        expected: list[tuple[str, Callable[[object], bool], str]] = [
            *((name, _is_int, "an integer") for name in ("max_new_tokens", "steps", "seed")),
            ("block_length", lambda value: value is None or _is_int(value), "an integer or null"),
            ("temperature", lambda value: _is_int(value) or isinstance(value, float), "a number"),
            *((name, lambda value: isinstance(value, str), "a name") for name in ("remasking", "confidence_from")),
            *((name, lambda value: isinstance(value, bool), "true or false") for name in _BOOLEANS),
            *((name, _is_token_list, "a list of token ids, or null") for name in ("eos_token_ids", "suppress_tokens")),
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


_BOOLEANS = ("stop_at_eos", "suppress_eos", "suppress_eos_confidence", "return_trace")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
