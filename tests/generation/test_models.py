"""The sampler on real (tiny) models: LLaDA's reference order, batches, padding, adapters, and bad prompts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dlm_tune.generation import DiffusionGenerationConfig, generate, pad_prompts
from dlm_tune.generation.config import REMASKING_RULES
from tests.tiny_models import EOS_ID, MASK_ID, tiny_dream, tiny_llada

PROMPTS = [[9, 20, 33, 41, 50], [12, 13], [77, 60, 61, 62, 63, 64, 65], [101]]
OPTIONS = {"max_new_tokens": 12, "block_length": 6, "steps": 8}


def double(make_model):
    """In float64, so that rounding cannot turn a near tie."""
    return make_model(seed=3).double()


def reference_llada(model, prompt, gen_length, steps, block_length):
    """LLaDA's generation at temperature 0, written from the paper on the dense logits: low-confidence remasking."""
    x = torch.cat([prompt, torch.full((1, gen_length), MASK_ID)], dim=1)
    num_blocks = gen_length // block_length
    for block in range(num_blocks):
        end = prompt.shape[1] + (block + 1) * block_length
        for step in range(steps // num_blocks):
            logits = model(input_ids=x).logits
            logits[..., MASK_ID] = -torch.inf
            if model.config.logits_shift:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            probability, token = logits.softmax(-1).max(-1)
            confidence = probability.masked_fill(x != MASK_ID, -1)
            confidence[:, end:] = -1
            open_positions = int((x[:, :end] == MASK_ID).sum())
            remaining_steps = steps // num_blocks - step
            chosen = confidence[0].topk(-(-open_positions // remaining_steps)).indices
            x[0, chosen] = token[0, chosen]
    return x


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
@pytest.mark.parametrize(("steps", "block_length"), [(12, 12), (12, 4), (6, 6), (8, 6), (4, 12)])
def test_greedy_decoding_is_the_reference_loop(make_model, steps, block_length):
    model = double(make_model)
    for prompt in PROMPTS:
        prompt = torch.tensor([prompt])
        expected = reference_llada(model, prompt, 12, steps, block_length)
        options = {"max_new_tokens": 12, "steps": steps, "block_length": block_length, "stop_at_eos": False}
        assert generate(model, prompt, **options).sequences.equal(expected)
    assert len(expected[0, 1:].unique()) > 2, "the model's output must vary for the order to matter"


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", REMASKING_RULES)
def test_ragged_batches_give_the_tokens_of_single_rows(make_model, temperature, remasking):
    model = double(make_model)
    options = {**OPTIONS, "temperature": temperature, "remasking": remasking, "return_trace": True}
    batch = generate(model, *pad_prompts(PROMPTS, EOS_ID), **options)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, torch.tensor([prompt]), row_keys=torch.tensor([row]), **options)
        assert batch.sequences[row, -12:].equal(alone.sequences[0, -12:])
        assert batch.trace[row].equal(alone.trace[0])


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_rows_of_equal_length_are_equal_to_the_bit_in_float32(make_model):
    model = make_model(seed=3)
    prompts = torch.tensor([[9, 20, 33], [40, 41, 42], [9, 20, 34], [100, 3, 3]])
    batch = generate(model, prompts, **OPTIONS).sequences
    assert batch.equal(torch.cat([generate(model, prompt[None], **OPTIONS).sequences for prompt in prompts]))


def test_empty_prompts_generate_from_nothing():
    output = generate(tiny_llada(), torch.zeros(2, 0, dtype=torch.long), **OPTIONS, temperature=1.0)
    assert output.sequences.shape == (2, 12)
    assert not output.sequences[0].equal(output.sequences[1])


def test_early_stop_does_not_change_what_precedes_the_end():
    model = double(tiny_llada)
    input_ids, attention_mask = pad_prompts(PROMPTS * 8, EOS_ID)
    options = {**OPTIONS, "temperature": 1.5, "eos_token_ids": list(range(10, 30))}
    stopped = generate(model, input_ids, attention_mask, **options).sequences[:, -12:]
    full = generate(model, input_ids, attention_mask, stop_at_eos=False, **options).sequences[:, -12:]
    is_end = (full >= 10) & (full < 30)
    before = is_end.cumsum(1) - is_end.long() == 0
    assert stopped[before].equal(full[before])
    assert (stopped[~before] == model.config.pad_token_id).all()
    assert 0.2 < before.double().mean() < 0.95


def test_a_peft_model_generates_with_its_adapter():
    base = tiny_llada(seed=3)
    prompt = torch.tensor(PROMPTS[:1])
    without = generate(base, prompt, **OPTIONS).sequences
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = generate(model, prompt, **OPTIONS).sequences
    assert not adapted.equal(without)
    assert model.generate(input_ids=prompt, **OPTIONS).sequences.equal(adapted)
    with model.disable_adapter():
        assert generate(model, prompt, **OPTIONS).sequences.equal(without)


def test_the_models_own_generate_is_the_sampler():
    model = tiny_llada(seed=3)
    input_ids, attention_mask = pad_prompts(PROMPTS, EOS_ID)
    config = DiffusionGenerationConfig(**OPTIONS)
    expected = generate(model, input_ids, attention_mask, config).sequences
    assert model.generate(input_ids, attention_mask=attention_mask, generation_config=config).sequences.equal(expected)


PROMPT = torch.tensor([PROMPTS[0], PROMPTS[0]])


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (
            ValueError,
            ["row 1", "mask token (id 2)", "position 3"],
            {"input_ids": torch.tensor([[5, 5, 5, 5], [5, 5, 5, 2]])},
        ),
        (
            ValueError,
            ["row 0", "padding after its prompt", "left"],
            {"attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 2)},
        ),
        (ValueError, ["attention_mask", "(2, 4)", "(2, 5)"], {"attention_mask": torch.ones(2, 4)}),
        (ValueError, ["input_ids of shape (5,)", "(rows, prompt length)"], {"input_ids": PROMPT[0]}),
        (ValueError, ["dtype torch.float32"], {"input_ids": PROMPT.float()}),
        (ValueError, ["max_new_tokens=480", "256", "251 or less"], {"max_new_tokens": 480, "block_length": None}),
        (ValueError, ["suppress_tokens", "128", "128 logits"], {"suppress_tokens": [128]}),
        (ValueError, ["suppress_eos=True", "eos_token_ids"], {"suppress_eos": True, "eos_token_ids": []}),
        (ValueError, ["row_keys", "2 rows"], {"row_keys": torch.arange(3)}),
        (ValueError, ["block_length=5", "max_new_tokens=12"], {"block_length": 5}),
        (TypeError, ["'temprature'", "Did you mean 'temperature'"], {"temprature": 1.0}),
    ],
)
def test_bad_input(error, words, arguments):
    with pytest.raises(error) as caught:
        generate(tiny_llada(), **{"input_ids": PROMPT, **OPTIONS} | arguments)
    for word in words:
        assert word in str(caught.value)


def test_models_that_cannot_be_sampled_are_refused():
    model = tiny_llada()
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match=r"mask_token_id=None.*load_model"):
        generate(model, PROMPT)
    with pytest.raises(ValueError, match=r"a prompt is empty.*BOS"):
        generate(tiny_dream(), *pad_prompts([[5], []], EOS_ID))

    class Dense(torch.nn.Module):
        config = tiny_llada().config

        def forward(self, input_ids, attention_mask, position_mask):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 128)})

    with pytest.raises(TypeError, match=r"Dense.*ignores position_mask.*load_model"):
        generate(Dense(), PROMPT, **OPTIONS)
