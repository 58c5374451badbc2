"""Checkpoints of SMDM (lit-gpt modules) become Llama checkpoints that `load_model` reads.

SMDM: Nie et al., "Scaling up Masked Diffusion Models on Text" (arXiv 2410.18514). Its models are Llama's but for the
fused and grouped projection of queries, keys and values, and for an LM head without a row for the mask token.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dlm_tune.models.checkpoint_files import checkpoint_directory
from dlm_tune.models.convert import DEFAULT_MASK_TOKEN, ConvertedCheckpoint, write_record, write_tokenizer
from dlm_tune.models.loading import load_config
from dlm_tune.models.output_directory import check_shard_size, new_directory
from dlm_tune.models.tokenizer import read_tokenizer

# Layers, heads, width and MLP width of `Diff_LLaMA_...M` in the authors' lit_gpt/config.py; there, each head has its
# own keys and values, eps is 1e-5, the rotary base 10,000, and texts are at most 2,048 tokens long.
ARCHITECTURES: dict[str, tuple[int, int, int, int]] = {
    "Diff_LLaMA_6M": (6, 4, 256, 1024),
    "Diff_LLaMA_19M": (8, 6, 384, 1536),
    "Diff_LLaMA_34M": (8, 8, 512, 2048),
    "Diff_LLaMA_48M": (9, 9, 576, 2304),
    "Diff_LLaMA_66M": (10, 10, 640, 2560),
    "Diff_LLaMA_85M": (13, 10, 640, 2560),
    "Diff_LLaMA_75M": (16, 8, 640, 1600),
    "Diff_LLaMA_113M": (12, 12, 768, 3072),
    "Diff_LLaMA_142M": (15, 12, 768, 3072),
    "Diff_LLaMA_170M": (18, 12, 768, 3072),
    "Diff_LLaMA_180M": (14, 14, 896, 3584),
    "Diff_LLaMA_206M": (16, 14, 896, 3584),
    "Diff_LLaMA_231M": (18, 14, 896, 3584),
    "Diff_LLaMA_268M": (16, 16, 1024, 4096),
    "Diff_LLaMA_302M": (18, 16, 1024, 4096),
    "Diff_LLaMA_336M": (20, 16, 1024, 4096),
    "Diff_LLaMA_472M": (18, 10, 1280, 5120),
    "Diff_LLaMA_551M": (21, 10, 1280, 5120),
    "Diff_LLaMA_571M": (18, 11, 1408, 5632),
    "Diff_LLaMA_629M": (24, 10, 1280, 5120),
    "Diff_LLaMA_666M": (21, 11, 1408, 5632),
    "Diff_LLaMA_717M": (19, 12, 1536, 6144),
    "Diff_LLaMA_761M": (24, 11, 1408, 5632),
    "Diff_LLaMA_831M": (22, 12, 1536, 6144),
    "Diff_LLaMA_944M": (25, 12, 1536, 6144),
    "Diff_LLaMA_1028M": (20, 14, 1792, 7168),
    "Diff_LLaMA_1233M": (24, 14, 1792, 7168),
    "Diff_LLaMA_1476M": (22, 16, 2048, 8192),
    "Diff_LLaMA_1678M": (25, 16, 2048, 8192),
    "Diff_LLaMA_2121M": (28, 17, 2176, 8704),
}
_MAX_LENGTH = 2048
_RENAMES = {
    "norm_1.weight": "input_layernorm.weight",
    "norm_2.weight": "post_attention_layernorm.weight",
    "attn.proj.weight": "self_attn.o_proj.weight",
    "mlp.swiglu.w1.weight": "mlp.gate_proj.weight",
    "mlp.swiglu.w2.weight": "mlp.up_proj.weight",
    "mlp.swiglu.w3.weight": "mlp.down_proj.weight",
}
_FUSED = "attn.attn.weight"
_OUTER = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class SmdmShape:
    """Sizes of an SMDM model; all but the number of heads are those of its tensors."""

    num_layers: int
    num_heads: int
    num_groups: int
    width: int
    mlp_width: int
    vocab_size: int


def convert_smdm(
    weights_file: str | Path,
    output_dir: str | Path,
    *,
    tokenizer: str | Path,
    architecture: str | None = None,
    num_heads: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> ConvertedCheckpoint:
    """Write a checkpoint of SMDM as a Llama checkpoint with mask token V, the row behind its vocabulary.

    The authors' LM head has V rows and their softmax V columns. A Llama head has as many rows as the embedding table,
    so it gets a row of zeros, and `excludes_mask_logit: true` in config.json makes `load_model` keep its column out of
    every softmax. Plain transformers gives the same logits with one column, the last, to be dropped.

    The authors round the rotary cosines to bfloat16, we do not: logits of trained weights differ by 1e-3 for that.

    Args:
        weights_file: the .safetensors file, or a .pth file, of which tensors alone are read (`weights_only=True`).
        output_dir: directory to write.
        tokenizer: directory or Hub name of its tokenizer; the authors use TinyLlama's.
        architecture: name in ARCHITECTURES; None finds the one with the tensors' sizes.
        num_heads: for sizes that are not in ARCHITECTURES.
        dtype: of the written weights; None keeps the file's.
        max_shard_size: largest weights file.
        overwrite: replace a checkpoint in `output_dir`.

    Raises:
        ValueError: the file is not such a checkpoint, the architecture is another or not known, the tokenizer is
            another one's, or the output directory is not empty.
        OSError: the disk is full, or another fault of writing.
    """
    check_shard_size(max_shard_size)
    weights_file = Path(weights_file).expanduser()
    words = _tokenizer_with_mask(checkpoint_directory(tokenizer, with_weights=False))
    with new_directory(output_dir, overwrite=overwrite, sources=[weights_file]) as folder:
        tensors = _read_tensors(weights_file)
        shape = _shape_of(tensors, weights_file, architecture, num_heads)
        if words.mask_token_id != shape.vocab_size:
            raise ValueError(
                f"the mask token of {weights_file.name} is {shape.vocab_size}, behind its vocabulary, but in the "
                f"tokenizer {str(tokenizer)!r} it is {words.mask_token_id}; give the tokenizer that the model was "
                "trained with, such as TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
            )
        model = _llama(shape, native_tensors(tensors, shape), words, dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        write_tokenizer(words, folder)
        write_record(folder, weights_file, "a checkpoint of SMDM")
        load_config(folder)
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return ConvertedCheckpoint(
        directory=Path(output_dir),
        model_type="llama",
        num_parameters=model.num_parameters(),
        dtype=model.dtype,
        rows_before=shape.vocab_size + 1,
        rows=shape.vocab_size + 1,
        mask_token=words.mask_token,
        mask_token_id=shape.vocab_size,
        mask_embedding="the checkpoint's own row",
        logits_shift=False,
        num_bytes=num_bytes,
    )


def native_tensors(tensors: dict[str, Tensor], shape: SmdmShape) -> dict[str, Tensor]:
    """Return SMDM's tensors under Llama's names, with queries, keys and values apart and a head of V + 1 rows.

    The fused projection holds, for each group of heads, the rows of its queries, then of its key, then of its value.
    """
    native = {new: tensors[old] for old, new in _OUTER.items()}
    head = native["lm_head.weight"]
    native["lm_head.weight"] = torch.cat([head, head.new_zeros(1, shape.width)])
    for layer in range(shape.num_layers):
        old, new = f"transformer.h.{layer}.", f"model.layers.{layer}."
        native |= {new + name: tensors[old + key] for key, name in _RENAMES.items()}
        queries = shape.num_heads // shape.num_groups
        fused = tensors[old + _FUSED]
        fused = fused.view(shape.num_groups, queries + 2, shape.width // shape.num_heads, shape.width)
        for name, part in zip("qkv", fused.split((queries, 1, 1), dim=1), strict=True):
            native[f"{new}self_attn.{name}_proj.weight"] = part.reshape(-1, shape.width)
    return native


def _llama(shape: SmdmShape, tensors: dict[str, Tensor], tokenizer: Any, dtype: torch.dtype | None) -> Any:
    config = LlamaConfig(
        vocab_size=shape.vocab_size + 1,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_groups,
        max_position_embeddings=_MAX_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_causal=False,
        use_cache=False,
        logits_shift=False,
        mask_token_id=shape.vocab_size,
        excludes_mask_logit=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    dtype = dtype or functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    config.dtype = dtype
    return model


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file} is not a file; give the .safetensors or .pth file of an SMDM model")
    try:
        if file.suffix == ".safetensors":
            tensors: Any = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as tensors ({str(error).splitlines()[0]}): it is damaged, or holds more than "
            "tensors, which could run code. Copy it again, or give the .safetensors file"
        ) from error
    # training checkpoints of lit-gpt keep the weights beside the optimiser's state
    return tensors["model"] if isinstance(tensors.get("model"), dict) else tensors


def _shape_of(tensors: dict[str, Tensor], file: Path, architecture: str | None, num_heads: int | None) -> SmdmShape:
    """Sizes of the tensors, every one of which is accounted for, and the number of heads."""
    layers = {int(found[1]) for key in tensors if (found := re.match(r"transformer\.h\.(\d+)\.", key))}
    expected = set(_OUTER) | {f"transformer.h.{layer}.{key}" for layer in layers for key in (*_RENAMES, _FUSED)}
    if not layers or set(tensors) != expected or layers != set(range(len(layers))):
        difference = sorted(set(tensors) ^ expected)
        raise ValueError(
            f"{file} is not an SMDM model: {len(difference)} tensors are missing or unknown "
            f"({', '.join(difference[:4])}); supported are the masked-diffusion models of ML-GSAI/SMDM, with names "
            f"such as transformer.h.0.{_FUSED}"
        )
    rows, width = tensors["transformer.wte.weight"].shape
    vocab_size = len(tensors["lm_head.weight"])
    if rows != vocab_size + 1:
        raise ValueError(
            f"{file} has {rows} embedding rows and {vocab_size} rows in its LM head, but an SMDM diffusion model has "
            "one embedding row more, for the mask token; its autoregressive models are not converted"
        )
    mlp_width = len(tensors["transformer.h.0.mlp.swiglu.w1.weight"])
    num_heads = _num_heads((len(layers), width, mlp_width), file, architecture, num_heads)
    fused_rows = len(tensors[f"transformer.h.0.{_FUSED}"])
    size, rest = divmod(width, num_heads) if num_heads > 0 else (0, 1)
    groups, remainder = divmod(fused_rows - width, 2 * size) if size else (0, 1)
    if rest or size % 2 or remainder or groups < 1 or num_heads % groups:
        raise ValueError(
            f"num_heads={num_heads} does not fit {file}, whose projection of queries, keys and values has "
            f"{fused_rows} rows for width {width}; give the number of heads it was trained with"
        )
    return SmdmShape(len(layers), num_heads, groups, width, mlp_width, vocab_size)


def _num_heads(sizes: tuple[int, int, int], file: Path, architecture: str | None, num_heads: int | None) -> int:
    layers, width, mlp_width = sizes
    found = f"{file} has {layers} layers of width {width} with MLPs of width {mlp_width}"
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    if architecture is not None and num_heads is not None:
        raise ValueError(f"architecture={architecture} says the number of heads: leave num_heads={num_heads} out")
    if num_heads is not None:
        return num_heads
    by_sizes = {(n, d, m): (name, heads) for name, (n, heads, d, m) in ARCHITECTURES.items()}
    name, heads = by_sizes.get(sizes, (None, 0))
    if architecture is not None and name != architecture:
        raise ValueError(f"architecture={architecture}, but {found}" + (f": it is {name}" if name else ""))
    if name is None:
        raise ValueError(f"{found}, sizes of no known architecture; give its number of heads as num_heads")
    return heads


def _tokenizer_with_mask(directory: Path) -> Any:
    tokenizer = read_tokenizer(directory)
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": DEFAULT_MASK_TOKEN})
    return tokenizer
