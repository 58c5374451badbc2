"""A denoiser small enough to enumerate: the exact conditionals of a known joint distribution."""

import itertools
import math
from types import SimpleNamespace

import torch
from torch import Tensor


class JointModel:
    """Answers the sampler's forward with `p(x_i | visible tokens)` of a random joint over `num_tokens ** length` rows.

    Prompts are empty, so the canvas is the whole row. The mask token is the id after the ordinary ones, and its logit
    is the largest of all: a sampler that does not exclude it fails at once.
    """

    def __init__(self, num_tokens: int = 3, length: int = 3, sharpness: float = 1.8, seed: int = 0, **config):
        self.mask_token_id = num_tokens
        self.rows = list(itertools.product(range(num_tokens), repeat=length))
        generator = torch.Generator().manual_seed(seed)
        scores = sharpness * torch.randn(len(self.rows), generator=generator, dtype=torch.float64)
        self.joint = scores.softmax(0)
        self.config = SimpleNamespace(mask_token_id=num_tokens, eos_token_id=None, pad_token_id=None, **config)
        self.states = list(itertools.product(range(num_tokens + 1), repeat=length))
        self.conditionals = torch.stack([self._conditional(state) for state in self.states])
        self.radix = torch.tensor([(num_tokens + 1) ** (length - 1 - i) for i in range(length)])

    def _conditional(self, state: tuple[int, ...]) -> Tensor:
        """(L, V + 1) probabilities given the visible tokens; probability 0 for the mask."""
        result = torch.zeros(len(state), self.mask_token_id + 1, dtype=torch.float64)
        for row, probability in zip(self.rows, self.joint, strict=True):
            if all(seen in (self.mask_token_id, token) for seen, token in zip(state, row, strict=True)):
                for position, token in enumerate(row):
                    result[position, token] += probability
        return result / result.sum(-1, keepdim=True)

    def probabilities(self, state: tuple[int, ...]) -> list[list[float]]:
        return self.conditionals[self.states.index(state)][:, :-1].tolist()

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, position_mask: Tensor) -> SimpleNamespace:
        logits = self.conditionals[(input_ids * self.radix).sum(1)].log()
        logits[..., self.mask_token_id] = 100.0
        return SimpleNamespace(logits=logits[position_mask])


def chi_square(model: JointModel, samples: Tensor, expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic of `samples` (N, L) against the probabilities `expected`."""
    counts: dict[tuple[int, ...], int] = {}
    for row in samples.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert set(counts) <= set(expected)
    total = len(samples)
    return sum((counts.get(row, 0) - total * p) ** 2 / (total * p) for row, p in expected.items())


def total_variation(first: dict[tuple[int, ...], float], second: dict[tuple[int, ...], float]) -> float:
    return 0.5 * sum(abs(first.get(row, 0.0) - second.get(row, 0.0)) for row in {*first, *second})


def empirical(samples: Tensor) -> dict[tuple[int, ...], float]:
    rows, counts = samples.unique(dim=0, return_counts=True)
    return {tuple(row): count / len(samples) for row, count in zip(rows.tolist(), counts.tolist(), strict=True)}


def exact_law(model: JointModel, remasking: str, confidence_from: str, counts: list[int]) -> dict:
    """The law of the sampler's output, by enumeration of all its branches; independent of the sampler's code."""
    law = {(model.mask_token_id,) * len(model.states[0]): 1.0}
    for count in counts:
        following: dict[tuple[int, ...], float] = {}
        for state, weight in law.items():
            masked = [i for i, token in enumerate(state) if token == model.mask_token_id]
            table = model.probabilities(state)
            for tokens in itertools.product(range(model.mask_token_id), repeat=len(masked)):
                probability = weight * math.prod(table[i][v] for i, v in zip(masked, tokens, strict=True))
                for chosen, chance in _choices(masked, tokens, table, remasking, confidence_from, count):
                    new = list(state)
                    for i, v in chosen:
                        new[i] = v
                    following[tuple(new)] = following.get(tuple(new), 0.0) + probability * chance
        law = following
    return law


def _choices(masked, tokens, table, remasking, confidence_from, count):
    pairs = list(zip(masked, tokens, strict=True))
    if remasking == "random":
        subsets = list(itertools.combinations(pairs, count))
        return [(subset, 1 / len(subsets)) for subset in subsets]

    def score(pair):
        probs = table[pair[0]]
        ordered = sorted(probs, reverse=True)
        return {
            "low_confidence": probs[pair[1]] if confidence_from == "sampled" else ordered[0],
            "margin": ordered[0] - ordered[1],
            "entropy": sum(p * math.log(p) for p in probs if p > 0),
        }[remasking]

    return [(sorted(pairs, key=score, reverse=True)[:count], 1.0)]


class GuidedTable:
    """What guidance makes of a `JointModel` whose first token is the prompt, by the formula in probabilities.

    Stands for the model in `exact_law`, on the canvas behind that prompt.
    """

    def __init__(self, model: JointModel, prompt: int, guidance_scale: float, other_prompt: int | None = None):
        self.model, self.prompt, self.guidance_scale = model, prompt, guidance_scale
        self.mask_token_id = model.mask_token_id
        self.other_prompt = self.mask_token_id if other_prompt is None else other_prompt
        self.states = list(itertools.product(range(self.mask_token_id + 1), repeat=len(model.states[0]) - 1))

    def probabilities(self, state: tuple[int, ...]) -> list[list[float]]:
        cond = self.model.probabilities((self.prompt, *state))[1:]
        other = self.model.probabilities((self.other_prompt, *state))[1:]
        pairs = zip(state, cond, other, strict=True)
        return [self._guided(*pair) if v == self.mask_token_id else pair[0] for v, *pair in pairs]

    def _guided(self, cond: list[float], other: list[float]) -> list[float]:
        w = self.guidance_scale
        weights = [p ** (1 + w) / q**w for p, q in zip(cond, other, strict=True)]
        return [weight / sum(weights) for weight in weights]
