"""LLaDA without remote code: Llama's modules with bidirectional attention, under the authors' key names.

The original model is Llama with other names for weights and settings (fp32 logits of both agree to the bit), so these
classes keep the published `config.json` keys and weight names on disk and use transformers' modules in memory.
"""

import re
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from dlm_tune.models.checkpoint_config import CheckpointConfigMixin
from dlm_tune.models.mixin import DiffusionMixin

# Two different tensors are called `ff_out` (the LM head and the MLP's output), hence the anchors.
_ROOT = r"^model\.transformer\."
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_TOP_NAMES = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
LLADA_WEIGHT_RENAMES: list[tuple[str, str]] = [
    *((_ROOT + rf"{original}\.", f"{native}.") for original, native in _TOP_NAMES.items()),
    *(
        (_ROOT + rf"blocks\.(\d+)\.{original}\.", rf"model.layers.\1.{native}.")
        for original, native in _BLOCK_NAMES.items()
    ),
]

# The reference code falls back to GPT-2-like choices for these, so a file without them is not a Llama-shaped LLaDA.
_REQUIRED_KEYS = ("rope", "block_type", "weight_tying")

# The structure that Llama's modules represent, and what another value would need.
_REPRESENTABLE: dict[str, tuple[Any, str]] = {
    "block_type": ("llama", "sequential blocks fuse q, k and v in `att_proj`"),
    "block_group_size": (1, "grouped blocks are stored as `block_groups`"),
    "activation_type": ("silu", "only the SiLU gate is implemented"),
    "layer_norm_type": ("rms", "Llama's normalisation is RMSNorm"),
    "layer_norm_with_affine": (True, "Llama's RMSNorm has a weight"),
    "bias_for_layer_norm": (False, "Llama's RMSNorm has no bias"),
    "rope": (True, "Llama's positions are rotary"),
    "rope_full_precision": (True, "rotary angles are computed in float32"),
    "alibi": (False, "Llama's positions are rotary"),
    "attention_layer_norm": (False, "q/k normalisation over the full width does not exist in Llama"),
    "include_bias": (False, "Llama's linear layers and norms have no bias"),
    "input_emb_norm": (False, "Llama does not scale its embeddings"),
    "scale_logits": (False, "Llama does not scale its logits"),
    "residual_dropout": (0.0, "Llama has no dropout on the residual stream"),
    "embedding_dropout": (0.0, "Llama has no dropout on embeddings"),
}
# A null in the file means what the reference code takes it for.
_NULL_MEANS_DEFAULT = ("bias_for_layer_norm", "alibi", "scale_logits")


class LLaDAConfig(CheckpointConfigMixin, PreTrainedConfig):
    """Configuration in LLaDA's own keys; the defaults are those of LLaDA-8B.

    Llama's names (`hidden_size`, `num_key_value_heads`, ...) are readable, and accepted on construction, but never
    written. `mask_token_id` is None unless it is given or the vocabulary is the published one.

    Raises:
        ValueError: for structural settings Llama's modules cannot represent, all of them named at once; and, when
            built from a config.json, for missing structural keys.
    """

    model_type = "llada"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
        "tie_word_embeddings": "weight_tying",
    }
    published_vocab_size: ClassVar[int] = 126464
    published_mask_token_id: ClassVar[int] = 126336

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    multi_query_attention: bool | None = None
    mlp_ratio: int | float = 4
    mlp_hidden_size: int | None = 12288
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    weight_tying: bool = False
    include_bias: bool = False
    include_qkv_bias: bool | None = False
    rope: bool = True
    rope_theta: float = 500000.0
    rope_full_precision: bool = True
    rms_norm_eps: float = 1e-5
    block_type: str = "llama"
    block_group_size: int = 1
    activation_type: str = "silu"
    layer_norm_type: str = "rms"
    layer_norm_with_affine: bool = True
    bias_for_layer_norm: bool | None = False
    attention_layer_norm: bool = False
    attention_layer_norm_with_affine: bool = True
    alibi: bool = False
    alibi_bias_max: float = 8.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    input_emb_norm: bool = False
    scale_logits: bool = False
    flash_attention: bool = False
    init_device: str | None = "meta"
    init_fn: str = "mitchell"
    init_std: float = 0.02
    init_cutoff_factor: float | None = None
    precision: str | None = "amp_bf16"
    # Must be a declared field: transformers drops undeclared generation settings, and the authors' code reads it.
    use_cache: bool = False
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vocab_size == self.published_vocab_size and self.mask_token_id is None:
            self.mask_token_id = self.published_mask_token_id
        self._logits_shift = bool(kwargs.pop("logits_shift", self.default_logits_shift(self.architectures)))
        rope_parameters = {**(kwargs.pop("rope_scaling", None) or {}), **(kwargs.pop("rope_parameters", None) or {})}
        self.rope_theta = float(rope_parameters.pop("rope_theta", self.rope_theta))
        super().__post_init__(**kwargs)
        self._refuse_unrepresentable(rope_parameters)

    def _refuse_unrepresentable(self, rope_parameters: dict[str, Any]) -> None:
        faults = []
        for key, (value, reason) in _REPRESENTABLE.items():
            found = getattr(self, key)
            if found != value and not (found is None and key in _NULL_MEANS_DEFAULT):
                faults.append(f"{key}={found!r} ({reason}; supported: {value!r})")
        if rope_parameters.get("rope_type", rope_parameters.get("type", "default")) != "default":
            faults.append(f"rope_scaling={rope_parameters!r} (LLaDA's rotary angles are not scaled; supported: null)")
        if self.d_model % self.n_heads or self.n_heads % self.num_key_value_heads:
            faults.append(
                f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, d_model={self.d_model} (the heads must divide "
                "d_model, and the key/value heads must divide the heads)"
            )
        if self.embedding_size is not None and self.embedding_size < self.vocab_size:
            faults.append(
                f"embedding_size={self.embedding_size} (smaller than vocab_size={self.vocab_size}; use null or a size "
                "that holds the vocabulary)"
            )
        if faults:
            raise ValueError(
                "this LLaDA config cannot be represented natively: "
                + "; ".join(faults)
                + ". Only checkpoints with the structure of LLaDA-8B (Base, Instruct, 1.5) load; correct the "
                "config.json if it is wrong."
            )

    @classmethod
    def check_source(cls, config_dict: dict[str, Any]) -> None:
        """Refuse a config.json without the structural keys; see CheckpointConfigMixin."""
        missing = [key for key in _REQUIRED_KEYS if key not in config_dict]
        if missing:
            raise ValueError(
                f"the LLaDA config.json lacks {', '.join(missing)}. The authors' code would fall back to a GPT-2-like "
                "model (no rotary positions, tied weights, sequential blocks), which is surely not meant. Add the "
                "keys; for LLaDA-8B they are rope=true, block_type='llama', weight_tying=false."
            )

    # Names that Llama's modules read. Properties, so that nulls and original values survive a round trip.
    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads: n_kv_heads, or 1 with multi_query_attention, or n_heads."""
        if self.n_kv_heads is not None:
            return self.n_kv_heads
        return 1 if self.multi_query_attention else self.n_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int | None) -> None:
        self.n_kv_heads = value

    @property
    def intermediate_size(self) -> int:
        """MLP width: mlp_hidden_size, or mlp_ratio * d_model."""
        return self.mlp_hidden_size if self.mlp_hidden_size is not None else int(self.mlp_ratio * self.d_model)

    @intermediate_size.setter
    def intermediate_size(self, value: int | None) -> None:
        self.mlp_hidden_size = value

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding table and of the LM head."""
        return self.embedding_size if self.embedding_size is not None else self.vocab_size

    @property
    def hidden_act(self) -> str:
        """Llama's name of the activation."""
        return "silu"

    @property
    def attention_bias(self) -> bool:
        """False: Llama would add a bias to the output projection too; see include_qkv_bias."""
        return False

    @property
    def mlp_bias(self) -> bool:
        """Llama's MLP has no bias here."""
        return False

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rotary settings in transformers' form; `rope_theta` is the source of truth."""
        return {"rope_type": "default", "rope_theta": float(self.rope_theta)}

    @rope_parameters.setter
    def rope_parameters(self, value: dict[str, Any] | None) -> None:
        # transformers standardises and re-assigns this on construction; nothing but rope_theta may be stored.
        pass


class LLaDAModelLM(DiffusionMixin, LlamaForCausalLM):
    """LLaDA's mask predictor; reads and writes the authors' weight names.

    The class name is the published one, so that `architectures` and `auto_map` in config.json stay right.
    """

    config_class = LLaDAConfig
    config: LLaDAConfig

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        rebuilt = config.num_embeddings != config.vocab_size or config.include_qkv_bias
        if config.num_embeddings != config.vocab_size:  # LlamaModel sizes its table by vocab_size
            self.model.embed_tokens = nn.Embedding(config.num_embeddings, config.d_model)
            self.lm_head = nn.Linear(config.d_model, config.num_embeddings, bias=False)
        if config.include_qkv_bias:
            for layer in self.model.layers:
                for name in ("q_proj", "k_proj", "v_proj"):
                    plain = getattr(layer.self_attn, name)
                    setattr(layer.self_attn, name, nn.Linear(plain.in_features, plain.out_features, bias=True))
        if rebuilt:
            self.post_init()
        # Trainer's resume and load-best call plain load_state_dict on files in the original names.
        self.register_load_state_dict_pre_hook(_rename_on_load)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize both tables and keep `embedding_size` true to them; see PreTrainedModel."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.config.embedding_size is not None:
            self.config.embedding_size = embeddings.num_embeddings
        return embeddings

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save in the authors' layout (unless save_original_format=False); see PreTrainedModel."""
        if not getattr(self, "_weight_conversions", None):
            # A directory in transformers' names was loaded without renames: use the registered ones for saving.
            self._weight_conversions = None
        super().save_pretrained(save_directory, *args, **kwargs)


def to_native_name(name: str) -> str:
    """Return the in-memory name of a weight named as in the authors' files."""
    for pattern, replacement in LLADA_WEIGHT_RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def to_original_name(name: str) -> str:
    """Return the name in the authors' files of a weight named as in memory; the inverse of `to_native_name`."""
    for original, native in _TOP_NAMES.items():
        if name.startswith(f"{native}."):
            return f"model.transformer.{original}.{name.removeprefix(f'{native}.')}"
    for original, native in _BLOCK_NAMES.items():
        renamed, count = re.subn(
            rf"^model\.layers\.(\d+)\.{re.escape(native)}\.", rf"model.transformer.blocks.\1.{original}.", name
        )
        if count:
            return renamed
    return name


def _rename_on_load(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix + "model.transformer.")]:
        state_dict[prefix + to_native_name(key[len(prefix) :])] = state_dict.pop(key)


register_checkpoint_conversion_mapping(
    "llada", [WeightRenaming(pattern, replacement) for pattern, replacement in LLADA_WEIGHT_RENAMES], overwrite=True
)
