"""Scores of the guidance experiments, each with its standard error under `<name>_error`.

Category: adherence (a linear classifier of real glosses names the right category), fluency (NELBO under a diffusion
model that the generator has nothing to do with), diversity (distinct-n) and length. Grapheme-to-phoneme: error rate
and exact match.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rapidfuzz.distance import Levenshtein

from dlm_tune.diffusion import mask_prompt
from dlm_tune.evaluation.likelihood import estimate_nelbo

UNKNOWN = "<unk>"
NUM_NOISE_SAMPLES = 8  # forward passes of the judge of fluency for each gloss


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def mean_and_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """`{name: mean, name_error: standard error}`; the error of a single value is NaN."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return {name: float(numbers.mean()), f"{name}_error": float(numbers.std() / math.sqrt(len(numbers)))}


def ratio_and_error(name: str, numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Ratio of two sums over rows, and its standard error by the delta method."""
    above, below = (torch.tensor(values, dtype=torch.float64) for values in (numerators, denominators))
    ratio = float(above.sum() / below.sum())
    residuals = above - ratio * below
    count = len(residuals)
    error = math.sqrt(float(residuals.square().sum()) * count / max(count - 1, 1)) / float(below.sum())
    return {name: ratio, f"{name}_error": error}


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of the texts, which do not cross texts (Li et al., arXiv 1510.03055)."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


class CategoryClassifier:
    """TF-IDF of words and pairs of words, and a linear support vector machine; unknown words are left out."""

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        """Train on rows of `text` and `category`."""
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.pipeline import make_pipeline
            from sklearn.svm import LinearSVC
        except ModuleNotFoundError as error:
            raise SystemExit("adherence needs scikit-learn: pip install 'dlm-tune[guidance]'") from error
        vectoriser = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True)
        self._pipeline = make_pipeline(vectoriser, LinearSVC(random_state=0))
        self._pipeline.fit([self._clean(row["text"]) for row in rows], [row["category"] for row in rows])

    def matches(self, texts: Sequence[str], categories: Sequence[str]) -> list[float]:
        """1.0 where a text is given its category."""
        found = self._pipeline.predict([self._clean(text) for text in texts])
        return [float(given == category) for given, category in zip(found, categories, strict=True)]

    @staticmethod
    def _clean(text: str) -> str:
        return text.replace(UNKNOWN, " ")


def fluency(judge: Any, tokenizer: Any, texts: Sequence[str], canvas: int, batch_size: int = 250) -> dict[str, float]:
    """NELBO in nats per word under an unconditional model; EOS counts as one word, however many fill the canvas.

    The judge was trained on canvases of `canvas` tokens, filled with EOS, and scores all of them: that is a bound on
    the likelihood of the text and its length.
    """
    rows = [tokenizer(text)["input_ids"] if text else [] for text in texts]
    filled = torch.tensor([row + [tokenizer.eos_token_id] * (canvas - len(row)) for row in rows])
    nats = torch.cat(
        [
            estimate_nelbo(
                judge,
                filled[start : start + batch_size],
                num_samples=NUM_NOISE_SAMPLES,
                row_keys=torch.arange(start, min(start + batch_size, len(filled))),
            ).nats
            for start in range(0, len(filled), batch_size)
        ]
    )
    return ratio_and_error("nelbo", nats.tolist(), [len(row) + 1 for row in rows])


def branch_nelbo(
    name: str, model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], canvas: int, *, hide_prompts: bool
) -> dict[str, float]:
    """NELBO of the completions of pairs, in nats per word, EOS counted as in `fluency`; with prompts masked or not."""
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    answers = [tokenizer(row["completion"])["input_ids"] for row in rows]
    nats = torch.zeros(len(rows), dtype=torch.float64)
    for length in sorted({len(prompt) for prompt in prompts}):
        members = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        filled = [answers[i] + [tokenizer.eos_token_id] * (canvas - len(answers[i])) for i in members]
        input_ids = torch.tensor([prompts[i] + row for i, row in zip(members, filled, strict=True)])
        is_prompt = torch.zeros_like(input_ids, dtype=torch.bool)
        is_prompt[:, :length] = True
        if hide_prompts:
            input_ids = mask_prompt(input_ids, is_prompt, model.config.mask_token_id)
        keys = torch.tensor(members)
        nats[keys] = estimate_nelbo(model, input_ids, ~is_prompt, num_samples=NUM_NOISE_SAMPLES, row_keys=keys).nats
    return ratio_and_error(name, nats.tolist(), [len(answer) + 1 for answer in answers])


def category_scores(
    texts: Sequence[str],
    categories: Sequence[str],
    classifier: CategoryClassifier,
    judge: Any,
    tokenizer: Any,
    canvas: int,
) -> dict[str, float]:
    """All figures of glosses that were asked for, one category each."""
    return {
        **mean_and_error("adherence", classifier.matches(texts, categories)),
        **fluency(judge, tokenizer, texts, canvas),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        **mean_and_error("length", [len(text.split()) for text in texts]),
    }


def nearest_reference(answer: str, references: Sequence[str]) -> tuple[int, int]:
    """(edits, reference length), both in phonemes, for the reference with the fewest edits per phoneme."""
    given = answer.split()
    pairs = [(Levenshtein.distance(given, reference.split()), len(reference.split())) for reference in references]
    return min(pairs, key=lambda pair: pair[0] / pair[1])


def phoneme_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Phoneme error rate, exact match and length; a word with several pronunciations is held against the nearest."""
    pairs = [nearest_reference(*pair) for pair in zip(answers, references, strict=True)]
    return {
        **ratio_and_error("phoneme_error_rate", [edits for edits, _ in pairs], [length for _, length in pairs]),
        **mean_and_error("exact_match", [float(edits == 0) for edits, _ in pairs]),
        **mean_and_error("length", [len(answer.split()) for answer in answers]),
    }
