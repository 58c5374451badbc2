"""Guidance through every way in, and what is refused."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dlm_tune.evaluation.completions import evaluate_completions
from dlm_tune.generation import DiffusionGenerationConfig, generate
from tests.tiny_models import MASK_ID, tiny_dream, tiny_llada, tiny_tokenizer

PROMPT = [12, 13]
OPTIONS = {"max_new_tokens": 12, "block_length": 6, "steps": 8, "stop_at_eos": False}


def test_adapters_and_methods_guide():
    base = tiny_llada(seed=3)
    prompt = torch.tensor([PROMPT])
    options = OPTIONS | {"guidance_scale": 1.5}
    expected = generate(base, prompt, **options).sequences
    assert base.generate(prompt, **options).sequences.equal(expected)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = model.generate(input_ids=prompt, **options)
    assert not adapted.sequences.equal(expected)
    assert not adapted.sequences.equal(generate(model, prompt, **OPTIONS).sequences)
    assert adapted.num_row_passes == 16
    with model.disable_adapter():
        assert generate(model, prompt, **options).sequences.equal(expected)


@pytest.mark.parametrize("lengths", [(12, 6, 8), (12, None, 5), (12, 4, 7), (12, 4, 100), (7, None, 3), (1, None, 1)])
def test_committed_shares_are_those_of_the_sampler(lengths):
    options = dict(zip(("max_new_tokens", "block_length", "steps"), lengths, strict=True))
    shares = []

    def count(step, block, sequences):
        shares.append(float((sequences[0, len(PROMPT) :] != MASK_ID).double().mean()))

    generate(tiny_llada(), torch.tensor([PROMPT]), **options, stop_at_eos=False, on_step=count)
    assert DiffusionGenerationConfig(**options)._committed_shares() == pytest.approx([0.0, *shares[:-1]])


def test_evaluations_report_both_branches():
    rows = [{"prompt": f"{'word ' * (i % 3)}{i}:", "completion": "x"} for i in range(5)]
    model, tokenizer = tiny_llada(seed=1), tiny_tokenizer()
    texts = []
    for scale in (0.0, 2.0):
        config = DiffusionGenerationConfig(**OPTIONS, guidance_scale=scale)
        report = evaluate_completions(model, tokenizer, rows, config, batch_size=2, show_progress=False)
        assert (report.num_forward_passes, report.num_row_passes) == (24, 40 * (2 if scale else 1))
        texts.append([text for _, _, text in report.samples])
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_schedule": "linear"}, ["guidance_schedule='linear' has no effect", "guidance_scale=0"]),
        ({"guidance_batching": False}, ["guidance_batching=False has no effect", "leave guidance_batching at True"]),
        (
            {"guidance_schedule": "interval", "guidance_scale": 1},
            ["guidance_schedule='interval' needs guidance_interval", "[0.2, 0.8]"],
        ),
        (
            {"guidance_schedule": "interval", "guidance_scales": torch.ones(2)},
            ["guidance_schedule='interval' needs guidance_interval"],
        ),
        ({"negative_input_ids": torch.ones(2, 1).long()}, ["negative_input_ids", "guidance_scale=0"]),
        ({"negative_attention_mask": torch.ones(2, 1), "guidance_scale": 1}, ["negative_attention_mask belongs to"]),
        (
            {"negative_input_ids": torch.ones(3, 1).long(), "guidance_scale": 1},
            ["negative_input_ids hold 3 rows for 2 prompts", "expand"],
        ),
        (
            {"negative_input_ids": torch.full((2, 1), MASK_ID), "guidance_scale": 1},
            ["negative prompts: row 0", "mask token"],
        ),
        ({"negative_input_ids": torch.ones(2, 250).long(), "guidance_scale": 1}, ["negative prompts", "256"]),
        ({"guidance_scales": torch.ones(3)}, ["guidance_scales of shape (3,)", "2 rows"]),
        ({"guidance_scales": 1.5}, ["guidance_scales of shape float"]),
        ({"guidance_scales": torch.tensor([1.0, math.nan])}, ["guidance_scales=[1.0, nan]", "finite"]),
        ({"guidance_scale": 1.0, "input_ids": torch.zeros(2, 0).long()}, ["guidance_scale=1.0", "empty", "negative"]),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=r"\w") as caught:
        generate(tiny_llada(), **{"input_ids": torch.tensor([PROMPT, PROMPT])} | OPTIONS | options)
    for word in words:
        assert word in str(caught.value)


def test_options_that_row_scales_need_are_no_error():
    prompts = torch.tensor([PROMPT])
    generate(tiny_llada(), prompts, **OPTIONS, guidance_scales=torch.zeros(1), guidance_schedule="linear")


def test_a_shifted_model_needs_a_negative_prompt():
    given = {"negative_input_ids": torch.zeros(1, 0).long(), "guidance_scale": 1}
    with pytest.raises(ValueError, match=r"negative prompts: a prompt is empty.*BOS"):
        generate(tiny_dream(), torch.tensor([PROMPT]), **OPTIONS, **given)


def test_guiding_a_distilled_model_again_is_noticed(caplog):
    model = tiny_llada(seed=3)
    generate(model, torch.tensor([PROMPT]), **OPTIONS, guidance_scale=1.0)
    assert not caplog.records
    model.config.guidance_distillation_scale = 1.5
    generate(model, torch.tensor([PROMPT]), **OPTIONS)
    assert not caplog.records
    generate(model, torch.tensor([PROMPT]), **OPTIONS, guidance_scale=1.0)
    assert "distilled from a teacher guided at 1.5" in caplog.text
