"""Guidance in the sampler: against enumeration, against hand-built branches, and what it costs."""

import pytest
import torch

from dlm_tune.generation import generate, pad_prompts
from tests.tiny_models import EOS_ID, tiny_dream, tiny_llada

PROMPTS = [[9, 20, 33, 41, 50], [12, 13], [77, 60, 61, 62, 63, 64, 65], [101]]
OPTIONS = {"max_new_tokens": 12, "block_length": 6, "steps": 8}


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_batched_branches_give_the_tokens_of_two_passes(make_model):
    model = make_model(seed=3).double()
    inputs = pad_prompts(PROMPTS, EOS_ID)
    batched = generate(model, *inputs, **OPTIONS, guidance_scale=1.5, stop_at_eos=False)
    two_passes = generate(model, *inputs, **OPTIONS, guidance_scale=1.5, guidance_batching=False, stop_at_eos=False)
    unguided = generate(model, *inputs, **OPTIONS, stop_at_eos=False)
    assert batched.sequences.equal(two_passes.sequences)
    assert not batched.sequences.equal(unguided.sequences)
    assert (batched.num_forward_passes, batched.num_row_passes) == (8, 64)
    assert (two_passes.num_forward_passes, two_passes.num_row_passes) == (16, 64)
    assert (unguided.num_forward_passes, unguided.num_row_passes) == (8, 32)
