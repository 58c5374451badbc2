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
        activation_type="silu",
        alibi=False,
        attention_dropout=0.0,
        attention_layer_norm=False,
        bias_for_layer_norm=False,
        block_group_size=1,
        block_type="llama",
        d_model=128,
        embedding_dropout=0.0,
        embedding_size=size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        flash_attention=False,
        include_bias=False,
        include_qkv_bias=False,
        init_std=0.05,
        input_emb_norm=False,
        layer_norm_type="rms",
        layer_norm_with_affine=True,
        mask_token_id=tokenizer.mask_token_id,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        mlp_hidden_size=384,
        mlp_ratio=4,
        n_heads=4,
        n_kv_heads=4,
        n_layers=num_layers,
        pad_token_id=tokenizer.pad_token_id,
        residual_dropout=0.0,
        rms_norm_eps=1e-5,
        rope=True,
        rope_full_precision=True,
        rope_theta=10_000.0,
        scale_logits=False,
        use_cache=False,
        vocab_size=size,
        weight_tying=True,
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
