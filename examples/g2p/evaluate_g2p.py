"""Phoneme error rate and exact match of a grapheme-to-phoneme model on held-out words.

    python examples/g2p/evaluate_g2p.py --model outputs/g2p/full [--num_words 1000]

A word with several pronunciations is compared with the nearest one, as is usual for this task. `--model` is a
checkpoint, or the folder of an adapter.
"""

import argparse
import json
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from dlm_tune import DiffusionGenerationConfig, load_model, load_tokenizer
from dlm_tune.evaluation.completions import evaluate_completions
from dlm_tune.shipped import resolve_path

CANVAS = DiffusionGenerationConfig(max_new_tokens=32, block_length=32, steps=32)  # the recipes' block_length


def nearest_reference(answer: str, references: list[str]) -> tuple[int, int]:
    """Return (edits, reference length), both in phonemes, for the reference with the fewest edits per phoneme."""
    given = answer.split()
    pairs = [(Levenshtein.distance(given, reference.split()), len(reference.split())) for reference in references]
    return min(pairs, key=lambda pair: pair[0] / pair[1])


def error_rates(answers: list[str], references: list[list[str]]) -> dict[str, float]:
    """Return the phoneme error rate (edits over reference phonemes) and the share of words without an error."""
    pairs = [nearest_reference(*pair) for pair in zip(answers, references, strict=True)]
    return {
        "phoneme_error_rate": sum(edits for edits, _ in pairs) / sum(length for _, length in pairs),
        "exact_match": sum(edits == 0 for edits, _ in pairs) / len(pairs),
    }


def load(path: str) -> tuple:
    """Return model and tokenizer of a checkpoint or of an adapter's folder."""
    adapter_config = Path(path) / "adapter_config.json"
    if not adapter_config.is_file():
        return load_model(path), load_tokenizer(path)
    base = resolve_path(json.loads(adapter_config.read_text())["base_model_name_or_path"])
    return load_model(base, adapter=path), load_tokenizer(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, default=Path("data/g2p/test.jsonl"))
    parser.add_argument("--num_words", type=int, default=1000, help="spread evenly over the alphabet; 0 is all")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    if arguments.num_words:
        rows = rows[:: max(1, len(rows) // arguments.num_words)][: arguments.num_words]
    model, tokenizer = load(arguments.model)
    completed = evaluate_completions(model, tokenizer, rows, CANVAS)
    answers = [answer for _, _, answer in completed.samples]
    rates = error_rates(answers, [row["references"] for row in rows])
    for row, answer in list(zip(rows, answers, strict=True))[:: max(1, len(rows) // 8)]:
        print(f"{row['prompt']:16}{answer:34}expected {' or '.join(row['references'])}")
    print(
        f"{len(rows)} held-out words: phoneme error rate {100 * rates['phoneme_error_rate']:.1f} %, "
        f"exact match {100 * rates['exact_match']:.1f} %"
    )


if __name__ == "__main__":
    main()
