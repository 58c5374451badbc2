"""Write the untrained base of the quickstart: a character tokenizer and a small LLaDA-layout model.

    python examples/quickstart/base_checkpoint.py --output_dir outputs/quickstart/untrained

The checkpoint has the original LLaDA config keys, weight names and special tokens, so everything that works on it
works on LLaDA-8B. `recipes/quickstart/pretrain/base.yaml` trains it.
"""

import argparse
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm_tune.models import LLaDAConfig, LLaDAModelLM

# LLaDA's names. The header and end-of-turn tokens are those of its chat template.
EOS, BOS, MASK, UNKNOWN = "<|endoftext|>", "<|startoftext|>", "<|mdm_mask|>", "<unk>"
CHAT_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHARACTERS = string.ascii_lowercase + string.digits + " \n" + ".,:;!?'\"()/-"
VOCABULARY_SIZE = 64  # a multiple of 64, as in the published checkpoints; ids beyond the tokenizer's are spare
MAX_SEQUENCE_LENGTH = 128


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character; upper case is lowered, any other character becomes <unk>."""
    vocabulary = {token: i for i, token in enumerate((EOS, BOS, MASK, UNKNOWN, *CHAT_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        bos_token=BOS,
        mask_token=MASK,
        unk_token=UNKNOWN,
        additional_special_tokens=list(CHAT_TOKENS),
        model_max_length=MAX_SEQUENCE_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def untrained_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LLaDAModelLM:
    """Return a LLaDA of 0.86 million parameters: width 128, 4 blocks, 4 heads, tied embeddings."""
    torch.manual_seed(seed)
    config = LLaDAConfig(
        d_model=128,
        n_heads=4,
        n_kv_heads=4,
        n_layers=4,
        mlp_hidden_size=384,
        vocab_size=VOCABULARY_SIZE,
        embedding_size=VOCABULARY_SIZE,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart/untrained"))
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    arguments = parser.parse_args()
    tokenizer = character_tokenizer()
    model = untrained_model(tokenizer, arguments.seed)
    tokenizer.save_pretrained(arguments.output_dir)
    model.save_pretrained(arguments.output_dir)
    print(f"{arguments.output_dir}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
