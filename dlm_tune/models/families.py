"""What is known of each checkpoint family beside what its files say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Both templates mark the assistant's words and end-of-turn token as generated, so that TRL's `assistant_only_loss`
# trains the stop token, and open an assistant turn only when `add_generation_prompt` asks for it. ChatML's line break
# belongs to the turn, as in rows of prompt and completion: behind it the answer is filled with EOS.
LLADA_CHAT_TEMPLATE = (
    "{%- if bos_token -%}{{ bos_token }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] | trim + 'END_OF_TURN' }}{%- endgeneration -%}"
    "{%- else -%}{{ message['content'] | trim + 'END_OF_TURN' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] + 'END_OF_TURN\n' }}{%- endgeneration -%}"
    "{%- else -%}{{ message['content'] + 'END_OF_TURN\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

# The authors' names of layers, for those who write them into an adapter's configuration
_LLADA_NATIVE_NAMES = {
    "attn_out": "o_proj",
    "ff_proj": "gate_proj",
    "ff_out": "down_proj (of the layers) or lm_head (the last)",
    "wte": "embed_tokens",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "ln_f": "model.norm",
}
_LLAMA_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelFamily:
    """Facts of a family; a checkpoint's own files take precedence over them.

    Attributes:
        model_type: the `model_type` of config.json.
        end_of_turn_token: ends a chat turn; the tokenizer's EOS stands in where its vocabulary lacks it.
        chat_template: for tokenizers without a usable one; END_OF_TURN stands for the end-of-turn token.
        mask_token: the mask token's text, None where the checkpoint must name it.
        logits_shift: whether position i is predicted from position i - 1, where config.json does not say.
        eos_token: the end of a text, where the tokenizer does not say.
        lora_target_modules: the linear layers LoRA adapts by default; never the LM head.
        native_names: the authors' name of a layer -> its name here, where they differ.
    """

    model_type: str
    end_of_turn_token: str
    chat_template: str
    mask_token: str | None = None
    logits_shift: bool = False
    eos_token: str = "<|endoftext|>"
    lora_target_modules: tuple[str, ...] = _LLAMA_LINEAR_LAYERS
    native_names: Mapping[str, str] = field(default_factory=dict)


FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        ModelFamily(
            "llada",
            "<|eot_id|>",
            LLADA_CHAT_TEMPLATE,
            mask_token="<|mdm_mask|>",
            native_names=_LLADA_NATIVE_NAMES,
        ),
        ModelFamily("Dream", "<|im_end|>", CHATML_TEMPLATE, mask_token="<|mask|>", logits_shift=True),
        # Causal decoders whose attention follows config.is_causal, each proved bidirectional by a test.
        ModelFamily("llama", "<|eot_id|>", LLADA_CHAT_TEMPLATE, eos_token="<|end_of_text|>"),
        ModelFamily("mistral", "<|im_end|>", CHATML_TEMPLATE, eos_token="</s>"),
        ModelFamily("qwen2", "<|im_end|>", CHATML_TEMPLATE),
        ModelFamily("qwen3", "<|im_end|>", CHATML_TEMPLATE),
        ModelFamily("olmo2", "<|im_end|>", CHATML_TEMPLATE),
        ModelFamily("smollm3", "<|im_end|>", CHATML_TEMPLATE, eos_token="<|end_of_text|>"),
    )
}


def family_chat_template(family: ModelFamily, end_of_turn_token: str) -> str:
    """Return the family's chat template with the given end-of-turn token."""
    return family.chat_template.replace("END_OF_TURN", end_of_turn_token)


def end_of_turn_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the tokens that end a chat turn, of any family, in a tokenizer's vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[f.end_of_turn_token] for f in FAMILIES.values() if f.end_of_turn_token in vocabulary}
