"""Dream without remote code: Qwen2's modules with bidirectional attention and logits shifted by one.

Weight names are Qwen2's already (Dream was initialised from Qwen2.5). What needs care is config.json: the authors'
code reads `rope_theta` and `torch_dtype`, which transformers 5 writes under other names.
"""

from typing import Any, ClassVar

from transformers import Qwen2Config, Qwen2ForCausalLM

from dlm_tune.models.checkpoint_config import CheckpointConfigMixin
from dlm_tune.models.mixin import DiffusionMixin


class DreamConfig(CheckpointConfigMixin, Qwen2Config):
    """Configuration in Dream's keys (Dream-v0, Dream-Coder, DiffuCoder).

    `logits_shift` defaults to True for the architecture `DreamModel` and to False for `DreamForCausalLM`
    (DreamReasoner). `mask_token_id` is None unless it is given or the vocabulary is the published one.

    Raises:
        ValueError: for settings Qwen2's modules cannot represent bidirectionally (`use_mrope`, sliding windows).
    """

    model_type = "Dream"
    dtype_key: ClassVar[str | None] = "torch_dtype"
    published_vocab_size: ClassVar[int] = 152064
    published_mask_token_id: ClassVar[int] = 151666

    # Must be a declared field with the published value: transformers drops undeclared generation settings.
    use_cache: bool = False
    use_mrope: bool = False
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        faults = []
        if self.use_mrope:
            faults.append("use_mrope=True (multimodal rotary positions; supported: false)")
        if self.use_sliding_window:
            faults.append("use_sliding_window=True (every position attends to all others; supported: false)")
        if faults:
            raise ValueError(
                f"this Dream config cannot be represented natively: {'; '.join(faults)}. Correct the config.json if "
                "it is wrong; a checkpoint trained with these settings cannot be loaded."
            )
        if self.vocab_size == self.published_vocab_size and self.mask_token_id is None:
            self.mask_token_id = self.published_mask_token_id
        self._logits_shift = bool(kwargs.pop("logits_shift", self.default_logits_shift(self.architectures)))
        super().__post_init__(**kwargs)

    @classmethod
    def default_logits_shift(cls, architectures: list[str] | None) -> bool:
        """True unless the architecture is DreamReasoner's; see CheckpointConfigMixin."""
        return "DreamForCausalLM" not in (architectures or [])

    def to_original_dict(self, native: dict[str, Any]) -> dict[str, Any]:
        """Write rotary settings as `rope_theta` and `rope_scaling`, the only keys the authors' code reads."""
        rope_parameters = dict(native.pop("rope_parameters", None) or {})
        native["rope_theta"] = rope_parameters.pop("rope_theta", self.default_theta)
        is_scaled = rope_parameters.get("rope_type", "default") != "default"
        native["rope_scaling"] = rope_parameters if is_scaled else None
        native.pop("layer_types", None)
        return native


class DreamModel(DiffusionMixin, Qwen2ForCausalLM):
    """Dream's mask predictor; position i is predicted by the hidden state of position i - 1.

    The class name is the published one, so that `architectures` and `auto_map` in config.json stay right.
    """

    config_class = DreamConfig
    config: DreamConfig
