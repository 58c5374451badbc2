"""Steer the quickstart's base, which knows no prompts, by a small classifier of transformers.

    python examples/quickstart/inflection_data.py --pretraining
    python examples/guidance/classifier.py --output_file outputs/guidance/classifier.md

The base was pretrained on two kinds of lines: neighbouring words ("rambled ramblers rambles") and pronunciations
("tremble: t r eh m b ah l"). A one-layer BERT learns to tell such lines apart with a random share of their characters
masked, as it will see them during sampling, and then asks the sampler for pronunciations. A regular expression that
neither of them knows judges the form of what is written.
"""

import argparse
import json
import re
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from dlm_tune import ClassifierGuidance, DiffusionGenerationConfig, generate, load_model, load_tokenizer
from dlm_tune.generation import config_for_tokenizer, decode_completion

BASE = "models/quickstart-base"
DATA = Path("data/quickstart/pretrain.jsonl")
CANVAS = 48
PRONUNCIATION = re.compile(r"[a-z'.\-]+: ([a-z]{1,2} )*[a-z]{1,2}")
TOP_K = 8
SETTINGS = ({"method": "exact", "top_k": TOP_K}, {"method": "first_order"})


def read_lines(tokenizer, num_lines: int) -> tuple[Tensor, Tensor]:
    """Lines spread over the file, `(n, CANVAS)` ids filled with EOS as in pretraining, and whether they pronounce."""
    if not DATA.is_file():
        raise SystemExit(f"{DATA} is missing: run python examples/quickstart/inflection_data.py --pretraining first.")
    texts = [json.loads(line)["text"] for line in DATA.read_text().splitlines()]
    texts = [text for text in texts[:: max(1, len(texts) // num_lines)] if len(text) < CANVAS]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (CANVAS - len(row)) for row in rows])
    return ids, torch.tensor([": " in text for text in texts]).long()


def train_classifier(lines: Tensor, labels: Tensor, mask_token_id: int, steps: int) -> BertForSequenceClassification:
    """Fit a classifier to masked lines; prints its accuracy on the last tenth, which it is not trained on."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    classifier = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=64, **sizes))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    num_train = len(lines) * 9 // 10

    def masked(rows: Tensor) -> Tensor:
        return rows.masked_fill(torch.rand(rows.shape) < torch.rand(len(rows), 1), mask_token_id)

    for _ in range(steps):
        chosen = torch.randint(num_train, (128,))
        logits = classifier(input_ids=masked(lines[chosen])).logits
        loss = nn.functional.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    classifier.eval()
    with torch.no_grad():
        for share in (0.9, 0.5):
            held_out = lines[num_train:].masked_fill(torch.rand(lines[num_train:].shape) < share, mask_token_id)
            is_right = classifier(input_ids=held_out).logits.argmax(-1) == labels[num_train:]
            print(f"accuracy with {share:.0%} masked, lines not trained on: {float(is_right.float().mean()):.3f}")
    return classifier


def table_row(label: str, texts: list[str], seconds: float) -> str:
    """Share of lines of the wanted kind, and of its exact form, with standard errors; distinct lines; time."""
    shares = []
    for is_hit in (lambda text: ": " in text, PRONUNCIATION.fullmatch):
        share = sum(bool(is_hit(text)) for text in texts) / len(texts)
        shares.append(f"{share:.2f} ± {(share * (1 - share) / len(texts)) ** 0.5:.2f}")
    return f"| {label} | {' | '.join(shares)} | {len(set(texts)) / len(texts):.2f} | {seconds:.0f} |"


def main() -> None:
    """Train, steer and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_steps", type=int, default=1000)
    parser.add_argument("--num_lines", type=int, default=64, help="Steered lines of each setting.")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--output_file", type=Path, help="The table as a file.")
    arguments = parser.parse_args()
    model, tokenizer = load_model(BASE), load_tokenizer(BASE)
    options = {"max_new_tokens": CANVAS, "steps": CANVAS, "block_length": None, "remasking": "random"}
    config = config_for_tokenizer(DiffusionGenerationConfig(**options, temperature=1.0), tokenizer, model)
    classifier = train_classifier(*read_lines(tokenizer, 50_000), tokenizer.mask_token_id, arguments.train_steps)
    embeddings = classifier.get_input_embeddings().weight

    def log_prob(inputs: Tensor, attention_mask: Tensor, rows: Tensor) -> Tensor:
        given = {"input_ids": inputs} if inputs.ndim == 2 else {"inputs_embeds": inputs @ embeddings}
        return classifier(**given, attention_mask=attention_mask).logits.log_softmax(-1)[:, 1]

    table = ["| guidance | pronunciations | of their exact form | distinct | seconds |", "|---|---|---|---|---|"]

    def write(label: str, steering: ClassifierGuidance | None) -> None:
        start, empty = time.perf_counter(), torch.zeros(arguments.num_lines, 0, dtype=torch.long)
        lines = generate(model, empty, None, config, classifier=steering).sequences
        texts = [decode_completion(tokenizer, row, config.eos_token_ids or []) for row in lines.tolist()]
        table.append(table_row(label, texts, time.perf_counter() - start))
        print(table[-1], "e.g.", *texts[:2], sep="  ", flush=True)

    write("none", None)
    # what the cut to a few tokens does by itself
    nothing = ClassifierGuidance(lambda inputs, *_: torch.zeros(len(inputs)), top_k=TOP_K, batch_size=10**6)
    write(f"none, cut to the best {TOP_K} tokens", nothing)
    for setting in SETTINGS:
        for scale in arguments.scales:
            label = ", ".join([*(f"{name} {value}" for name, value in setting.items()), f"scale {scale:g}"])
            write(label, ClassifierGuidance(log_prob, scale=scale, batch_size=512, **setting))
    if arguments.output_file is not None:
        arguments.output_file.parent.mkdir(parents=True, exist_ok=True)
        arguments.output_file.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
