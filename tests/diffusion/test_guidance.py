"""Guided logits against the formula in probabilities, and the masked prompt."""

import math
from types import SimpleNamespace

import pytest
import torch

from dlm_tune.diffusion import guidance_keep_token_ids, guided_logits, mask_prompt

SCALES = [-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0]


def branches(num_positions=7, vocab=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(2, num_positions, vocab, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("scale", SCALES)
def test_the_softmax_is_the_tilted_distribution(scale):
    cond, uncond = branches()
    p, q = cond.softmax(-1), uncond.softmax(-1)
    expected = p ** (1 + scale) * q ** (-scale)
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(guided_logits(cond, uncond, scale).softmax(-1), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_guidance_and_no_condition_are_the_branches_to_the_bit(dtype):
    cond, uncond = branches(dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert guided_logits(cond, uncond, 0.0).equal(cond.to(wide))
    assert guided_logits(cond, uncond, -1.0).equal(uncond.to(wide))


def test_low_precision_branches_are_combined_in_float32():
    cond, uncond = branches(dtype=torch.bfloat16)
    expected = uncond.double() + 2.5 * (cond.double() - uncond.double())
    guided = guided_logits(cond, uncond, 1.5)
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_a_constant_in_a_branch_changes_nothing(scale):
    cond, uncond = branches()
    shifted = guided_logits(cond + 17.0, uncond - torch.arange(7.0)[:, None], scale)
    torch.testing.assert_close(shifted.softmax(-1), guided_logits(cond, uncond, scale).softmax(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_position_may_have_its_own_scale(dtype):
    """To the bit, also where float32 cannot hold the scale."""
    cond, uncond = branches(num_positions=200, dtype=dtype)
    scales = torch.cat([torch.tensor(SCALES), torch.linspace(-1.1, 3.3, 200 - len(SCALES))]).double() * (1 + 1e-9)
    together = guided_logits(cond, uncond, scales)
    for n, scale in enumerate(scales.tolist()):
        assert together[n].equal(guided_logits(cond[n : n + 1], uncond[n : n + 1], scale)[0])


@pytest.mark.parametrize("scale", [-0.5, 0.5, 2.0])
def test_excluding_tokens_afterwards_is_guidance_on_the_others(scale):
    """p_c^(1+w) p_u^(-w) of branches that are both restricted to a support is the same as restricting the result."""
    cond, uncond = branches()
    support = [0, 2, 3, 5, 8, 10]
    excluded = guided_logits(cond, uncond, scale).index_fill(-1, torch.tensor([1, 4, 6, 7, 9]), -torch.inf)
    restricted = guided_logits(cond[:, support], uncond[:, support], scale).softmax(-1)
    torch.testing.assert_close(excluded.softmax(-1)[:, support], restricted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["-inf", "min"])
@pytest.mark.parametrize("scale", [-2.0, -1.0, -0.5, 0.5, 1.0, 8.0])
def test_excluded_tokens_in_a_branch_give_the_limit_and_no_nan(dtype, value, scale):
    excluded = -math.inf if value == "-inf" else torch.finfo(dtype).min
    cond, uncond = branches(dtype=dtype)
    plain = guided_logits(cond, uncond, scale)
    cond[:, 0] = uncond[:, 0] = cond[:, 1] = excluded  # by both, and by the conditional branch alone
    guided = guided_logits(cond, uncond, scale)
    assert guided.isfinite().all()
    assert guided[:, 2:].equal(plain[:, 2:])
    if scale > -1:
        assert (guided.softmax(-1)[:, :2] == 0).all()
    if scale == -1:
        assert guided[:, 1].equal(uncond[:, 1].to(guided.dtype))
    cond, uncond = branches(dtype=dtype)
    uncond[:, 0] = -math.inf
    limit = guided_logits(cond, uncond, scale).softmax(-1)[:, 0]
    assert (limit == (1.0 if scale > 0 else 0.0)).all(), "0 to the power of -w"


def test_the_branches_are_left_as_they_are():
    cond, uncond = branches(dtype=torch.float32)
    before = cond.clone(), uncond.clone()
    guided_logits(cond, uncond, 1.5)
    assert cond.equal(before[0])
    assert uncond.equal(before[1])


def test_the_prompt_is_masked_but_for_kept_tokens():
    ids = torch.tensor([[0, 0, 1, 20, 30, 1], [1, 20, 20, 40, 50, 60]])
    prompt = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    assert mask_prompt(ids, prompt, 2).tolist() == [[0, 0, 2, 2, 30, 1], [2, 2, 2, 2, 50, 60]]
    assert mask_prompt(ids, prompt, 2, {1, 40}).tolist() == [[0, 0, 1, 2, 30, 1], [1, 2, 2, 40, 50, 60]]


@pytest.mark.parametrize(("value", "expected"), [([3, 1], [3, 1]), ([], []), (None, [])])
def test_kept_tokens_are_read_from_the_models_config(value, expected):
    assert guidance_keep_token_ids(SimpleNamespace(guidance_keep_token_ids=value)) == expected
    assert guidance_keep_token_ids(SimpleNamespace()) == []
