"""Write an untrained base of the guidance experiments: one token a word, and a small LLaDA-layout model.

    python examples/guidance/guidance_checkpoint.py --vocabulary data/guidance/category/vocabulary.txt \
        --output_dir outputs/guidance/category/untrained-0 --num_layers 3 --seed 0

Config keys, weight names and special tokens are LLaDA's, so that what works here works on LLaDA-8B.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm_tune.models import LLaDAConfig, LLaDAModelLM

# LLaDA's names
EOS, BOS, MASK, UNKNOWN = "<|endoftext|>", "<|startoftext|>", "<|mdm_mask|>", "<unk>"
SPECIAL_TOKENS = (EOS, BOS, MASK, UNKNOWN)
MAX_SEQUENCE_LENGTH = 32


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each of `words` between white space; any other word becomes <unk>."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        bos_token=BOS,
        mask_token=MASK,
        unk_token=UNKNOWN,
        model_max_length=MAX_SEQUENCE_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def untrained_model(tokenizer: PreTrainedTokenizerFast, num_layers: int, seed: int) -> LLaDAModelLM:
    """Return a LLaDA of width 128 with 4 heads and tied embeddings, 0.21 million parameters a block."""
    torch.manual_seed(seed)
    size = -(-len(tokenizer) // 64) * 64  # a multiple of 64, as in the published checkpoints
    config = LLaDAConfig(
        d_model=128,
        n_heads=4,
        n_kv_heads=4,
        n_layers=num_layers,
        mlp_hidden_size=384,
        vocab_size=size,
        embedding_size=size,
        weight_tying=True,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        rope_theta=10_000.0,
        init_std=0.05,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LLaDAModelLM(config)


def write_checkpoint(vocabulary: Path, output_dir: Path, num_layers: int, seed: int) -> int:
    """Write tokenizer and model; return the number of parameters."""
    tokenizer = word_tokenizer(vocabulary.read_text(encoding="utf-8").split("\n")[:-1])
    model = untrained_model(tokenizer, num_layers, seed)
    tokenizer.save_pretrained(output_dir)
    model.save_pretrained(output_dir)
    return model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=Path, required=True, help="one token a line")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    arguments = parser.parse_args()
    count = write_checkpoint(arguments.vocabulary, arguments.output_dir, arguments.num_layers, arguments.seed)
    print(f"{arguments.output_dir}: {count:,} parameters")


if __name__ == "__main__":
    main()
