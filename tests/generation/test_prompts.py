"""Prompts are tokenised as training tokenised them, and answers end at the tokenizer's end tokens."""

import pytest
import torch

from dlm_tune.generation import (
    DiffusionGenerationConfig,
    config_for_tokenizer,
    decode_completion,
    end_token_ids,
    pad_prompts,
    tokenize_prompt,
)
from tests.tiny_models import EOS_ID, MASK_ID, tiny_dream, tiny_llada, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "2+2?"}]
ANSWER = [{"role": "assistant", "content": "4"}]


@pytest.mark.parametrize("family", ["llada", "Dream"])
@pytest.mark.parametrize(("prompt", "completion"), [("past of walk:", " walked"), (MESSAGES, ANSWER)])
def test_prompts_are_the_prefix_that_trl_trains_on(family, prompt, completion):
    from trl.data_utils import _tokenize

    tokenizer = tiny_tokenizer(family)
    ids = tokenize_prompt(tokenizer, prompt)
    whole = _tokenize(tokenizer, prompt + completion)["input_ids"]
    assert ids == whole[: len(ids)]
    assert len(ids) > 4


def test_messages_need_a_chat_template():
    with pytest.raises(ValueError, match=r"no chat template.*load_tokenizer"):
        tokenize_prompt(tiny_tokenizer(chat_template=False), MESSAGES)


@pytest.mark.parametrize(("family", "end_of_turn"), [("llada", "<|eot_id|>"), ("Dream", "<|im_end|>")])
def test_end_tokens_are_eos_and_end_of_turn(family, end_of_turn):
    tokenizer = tiny_tokenizer(family)
    assert end_token_ids(tokenizer) == sorted([EOS_ID, tokenizer.convert_tokens_to_ids(end_of_turn)])
    assert end_token_ids(tiny_tokenizer(family, chat_template=False)) == [EOS_ID]


def test_a_template_that_closes_turns_with_plain_text_adds_no_end_token():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_token_ids(tokenizer) == [EOS_ID]


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_logits_without_a_token_are_suppressed(make_model):
    tokenizer = tiny_tokenizer()
    config = config_for_tokenizer(DiffusionGenerationConfig(suppress_tokens=[7]), tokenizer, make_model())
    assert config.suppress_tokens == [7, *range(len(tokenizer), 128)]
    assert config.eos_token_ids == end_token_ids(tokenizer)
    kept = config_for_tokenizer(DiffusionGenerationConfig(eos_token_ids=[9]), tokenizer, make_model())
    assert kept.eos_token_ids == [9]


def test_padding_is_on_the_left():
    input_ids, attention_mask = pad_prompts([[5, 6, 7], [8]], pad_token_id=0)
    assert input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad_prompts([[], []], None)[0].shape == (2, 0)
    assert pad_prompts([], None)[0].dtype == torch.long


def test_decoding_stops_at_the_first_end_token():
    tokenizer = tiny_tokenizer()
    end_of_turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ids = [*tokenizer("four")["input_ids"], MASK_ID, end_of_turn, *tokenizer("rest")["input_ids"], EOS_ID]
    ends = end_token_ids(tokenizer)
    assert decode_completion(tokenizer, ids, ends) == "four"
    assert decode_completion(tokenizer, ids, ends, skip_special_tokens=False) == "four<|mdm_mask|>"
    assert decode_completion(tokenizer, ids[:2], ends) == "fo"
