"""Tokenizers come with a mask token, an end, a padding token and a chat template that can be trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

from dlm_tune.models import load_model, load_tokenizer
from tests.models.test_loading import edit_json, save_adapter, save_decoder
from tests.tiny_models import EOS_ID, MASK_ID, save_tiny_checkpoint

both_families = pytest.mark.parametrize("family", ["llada", "Dream"])
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
]
# The published LLaDA template in our words: the assistant's header follows whatever add_generation_prompt says.
ALWAYS_OPEN = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def without_template(directory: Path) -> Path:
    (directory / "chat_template.jinja").unlink()
    return directory


@both_families
def test_special_tokens_and_template_are_set(family: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(without_template(save_tiny_checkpoint(tmp_path, family)))
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (MASK_ID, EOS_ID, EOS_ID)
    assert has_generation_markers(tokenizer.chat_template)
    assert is_chat_template_stop_token_trained(tokenizer)


@both_families
def test_family_template(family: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(without_template(save_tiny_checkpoint(tmp_path, family)))
    closed = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    opened = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    expected = {
        "llada": (
            "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "Dream": (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
            "<|im_start|>assistant\nYes.<|im_end|>\n",
            "<|im_start|>assistant\n",
        ),
    }[family]
    assert closed == expected[0]
    assert opened == expected[0] + expected[1]
    encoded = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    generated = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(generated) == {"llada": "Yes.<|eot_id|>", "Dream": "Yes.<|im_end|>\n"}[family]


def test_template_that_never_closes_is_replaced(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tmp_path, "llada")
    (directory / "chat_template.jinja").write_text(ALWAYS_OPEN)
    text = load_tokenizer(directory).apply_chat_template(MESSAGES, tokenize=False)
    assert text.endswith("Yes.<|eot_id|>")


def test_template_of_the_checkpoint_is_kept(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tmp_path, "llada")
    own = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(own)
    assert load_tokenizer(directory).chat_template == own


def test_base_vocabulary_without_turn_markers_ends_turns_with_eos(tmp_path: Path) -> None:
    """LLaDA-8B-Base: a stop token that is spelt out in characters could not be learned as one token."""
    directory = without_template(save_tiny_checkpoint(tmp_path, "llada"))
    content = (directory / "tokenizer.json").read_text().replace("<|eot_id|>", "<|reserved|>")
    (directory / "tokenizer.json").write_text(content)
    edit_json(directory / "tokenizer_config.json", extra_special_tokens=None, additional_special_tokens=None)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).endswith("Yes.<|endoftext|>")
    assert is_chat_template_stop_token_trained(tokenizer)


def strip_tokens(directory: Path, *names: str) -> Path:
    edit_json(directory / "tokenizer_config.json", **dict.fromkeys(names))
    return directory


def test_missing_tokens_come_from_the_config(tmp_path: Path) -> None:
    directory = strip_tokens(save_tiny_checkpoint(tmp_path, "llada"), "mask_token", "eos_token", "pad_token")
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.mask_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|mdm_mask|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert tokenizer("<|mdm_mask|>")["input_ids"] == [MASK_ID]


def test_missing_tokens_come_from_the_family(tmp_path: Path) -> None:
    directory = strip_tokens(save_tiny_checkpoint(tmp_path, "Dream"), "mask_token", "eos_token", "pad_token")
    edit_json(directory / "config.json", mask_token_id=None, eos_token_id=None)
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (MASK_ID, EOS_ID)


def test_mask_row_behind_the_vocabulary_gets_a_token(tmp_path: Path) -> None:
    directory = strip_tokens(save_tiny_checkpoint(tmp_path, "llada", mask_token_id=103), "mask_token")
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", 103)


def test_model_config_takes_precedence_over_the_file(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tmp_path, "llada")
    config = load_model(directory).config
    (directory / "config.json").unlink()
    assert load_tokenizer(directory, model_config=config).mask_token_id == MASK_ID
    config.mask_token_id = 50
    with pytest.raises(ValueError, match=r"mask_token='<\|mdm_mask\|>' \(id 2\).*mask_token_id=50"):
        load_tokenizer(directory, model_config=config)


def test_adapter_directory_uses_its_own_tokenizer_or_the_bases(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", "llada")
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(base).get_vocab()
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"adapter without a tokenizer.*base_model_name_or_path"):
        load_tokenizer(adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    assert load_tokenizer(adapter).chat_template == tokenizer.chat_template
    assert load_tokenizer(adapter).mask_token_id == MASK_ID


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_decoder_gets_a_template(model_type: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(without_template(save_decoder(tmp_path, model_type)))
    assert is_chat_template_stop_token_trained(tokenizer)


def test_dreams_remote_tokenizer_is_read_natively(tmp_path: Path) -> None:
    """Published Dream repositories have vocab.json and merges.txt, and a tokenizer class of their own."""
    save_tiny_checkpoint(tmp_path, "Dream", mask_token_id=31)
    for file in [*tmp_path.glob("token*"), *tmp_path.glob("chat_template*")]:
        file.unlink()
    characters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "ab"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(characters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    special = ["<|endoftext|>", "<|beginoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>"]
    settings: dict[str, Any] = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "special": True,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            }
            for index, token in enumerate(special, start=len(characters))
        },
        "mask_token": "<|mask|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("ab c<|mask|>")["input_ids"] == [28, 26, 2, 31]
    assert tokenizer.decode([28, 26, 2]) == "ab c"
    assert is_chat_template_stop_token_trained(tokenizer)


def test_other_remote_tokenizers_need_a_tokenizer_json(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tmp_path, "llada")
    auto_map = {"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]}
    edit_json(directory / "tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map=auto_map)
    assert load_tokenizer(directory).mask_token_id == MASK_ID
    (directory / "tokenizer.json").rename(directory / "vocab.json")
    with pytest.raises(ValueError, match=r"tokenizer_class='MyTokenizer' .*remote code.*tokenizer\.json"):
        load_tokenizer(directory)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tmp_path, "llada")
    edit_json(directory / "config.json", mask_token_id=50)
    with pytest.raises(ValueError, match=r"mask_token='<\|mdm_mask\|>' \(id 2\) but the model says mask_token_id=50"):
        load_tokenizer(directory)
    edit_json(directory / "config.json", mask_token_id=2)
    edit_json(directory / "tokenizer_config.json", pad_token="<|mdm_mask|>")
    with pytest.raises(ValueError, match=r"both as mask token and as padding or EOS.*pad_token"):
        load_tokenizer(directory)


def test_missing_mask_token_is_an_error(tmp_path: Path) -> None:
    directory = strip_tokens(save_tiny_checkpoint(tmp_path, "llada"), "mask_token")
    edit_json(directory / "config.json", mask_token_id=120)
    with pytest.raises(
        ValueError, match=r"no mask token, and mask_token_id=120 .* not in its vocabulary.*tokenizer_conf"
    ):
        load_tokenizer(directory)
    strip_tokens(save_decoder(tmp_path / "qwen2", "qwen2"), "mask_token")
    with pytest.raises(ValueError, match=r"has no mask token; set mask_token"):
        load_tokenizer(tmp_path / "qwen2")


def test_missing_eos_is_an_error(tmp_path: Path) -> None:
    directory = strip_tokens(save_decoder(tmp_path, "llama"), "eos_token", "pad_token")
    edit_json(directory / "config.json", eos_token_id=500)
    with pytest.raises(ValueError, match=r"no EOS token.*eos_token.*eos_token_id"):
        load_tokenizer(directory)


def test_vocabulary_larger_than_the_model_is_an_error(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tmp_path, "llada", vocab_size=90)
    with pytest.raises(ValueError, match=r"ids up to 102 but the model has 90 embedding rows.*resize"):
        load_tokenizer(directory)


def test_directory_without_tokenizer(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tmp_path, "llada")
    for file in directory.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer .*copy the tokenizer files"):
        load_tokenizer(directory)
