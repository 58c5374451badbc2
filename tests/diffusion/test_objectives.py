import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlm_tune.diffusion import LOSS_WEIGHTINGS, NoisyBatch, token_weights


def noisy_batch(masked: torch.Tensor, weights: torch.Tensor | None = None) -> NoisyBatch:
    if weights is None:
        weights = torch.full((len(masked),), 3.0, dtype=torch.float64)
    return NoisyBatch(masked.long(), masked, weights, torch.full((len(masked),), 0.5, dtype=torch.float64))


def cart_by_definition(masked: list[bool], attended: list[bool], p: float) -> list[float]:
    """The double loop over tokens."""
    weights = [0.0] * len(masked)
    for n in range(len(masked)):
        if masked[n]:
            for m in range(len(masked)):
                if attended[m] and not masked[m]:
                    weights[n] += 0.5 * p * (1 - p) ** (abs(n - m) - 1)
    return weights


rows = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.7, 1.0])
@given(tokens=rows, padding=st.integers(0, 6), is_left=st.booleans())
def test_cart_equals_the_double_loop_for_any_padding(p, tokens, padding, is_left):
    """Tokens are (target, drawn as masked); a masked token is a target."""
    target = [is_target for is_target, _ in tokens]
    masked = [is_target and is_drawn for is_target, is_drawn in tokens]
    expected = cart_by_definition(masked, [True] * len(tokens), p)
    pad = [False] * padding
    masked, target, attended = (
        torch.tensor([pad + row if is_left else row + pad]) for row in (masked, target, [True] * len(tokens))
    )
    found = token_weights(noisy_batch(masked), target, attended, "cart", geometric_p=p)[0]
    found, outside = (found[padding:], found[:padding]) if is_left else found.split([len(tokens), padding])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not outside.any()


@pytest.mark.parametrize("p", [0.1, 0.3, 0.7])
def test_cart_of_one_masked_token_in_a_long_row_is_one(p):
    masked = torch.arange(1001)[None] == 500
    weights = token_weights(noisy_batch(masked), masked, torch.ones_like(masked), "cart", geometric_p=p)
    assert weights[0, 500].item() == pytest.approx(1, abs=1e-12)
    assert weights.count_nonzero() == 1


def test_cart_of_a_fully_masked_row_is_zero():
    masked = torch.ones(1, 9, dtype=torch.bool)
    padded = torch.nn.functional.pad(masked, (0, 4))
    assert not token_weights(noisy_batch(padded), padded, padded, "cart").any()


def test_padding_moves_no_cart_weight_by_one_bit():
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(5, 37, generator=generator) < 0.5
    attended = torch.ones_like(masked)
    alone = token_weights(noisy_batch(masked), attended, attended, "cart")
    for left, right in ((0, 91), (91, 0), (3, 5)):
        padded, kept = (torch.nn.functional.pad(rows, (left, right)) for rows in (masked, attended))
        weights = token_weights(noisy_batch(padded), kept, kept, "cart")
        assert torch.equal(weights[:, left : left + 37], alone)


def test_prompts_are_visible_to_cart():
    masked = torch.tensor([[False, False, True, True]])
    weights = token_weights(noisy_batch(masked), masked, torch.ones_like(masked), "cart", geometric_p=0.5)
    assert weights.tolist() == [[0, 0, 0.5 * (0.5 + 0.25), 0.5 * (0.25 + 0.125)]]


def test_nelbo_and_uniform():
    masked = torch.tensor([[True, False, True], [False, True, False]])
    noisy = noisy_batch(masked, torch.tensor([1.5, 4.0], dtype=torch.float64))
    every = torch.ones_like(masked)
    assert token_weights(noisy, every, every, "nelbo").tolist() == [[1.5, 0, 1.5], [0, 4, 0]]
    assert token_weights(noisy, every, every, "uniform").tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_tokens_that_are_no_longer_targets_count_nothing(weighting):
    masked = torch.tensor([[True, False, True]])
    weights = token_weights(
        noisy_batch(masked), torch.tensor([[True, True, False]]), torch.ones_like(masked), weighting
    )
    assert weights.dtype == torch.float64
    assert (weights[0] > 0).tolist() == [True, False, False]


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, float("nan")])
def test_geometric_p_outside_its_range_is_refused(p):
    masked = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"geometric_p={p} must be in \(0, 1\]"):
        token_weights(noisy_batch(masked), masked, masked, "cart", geometric_p=p)


def test_unknown_weighting_is_refused():
    masked = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="loss_weighting='scheduler' is unknown: choose 'nelbo', 'uniform', 'cart'"):
        token_weights(noisy_batch(masked), masked, masked, "scheduler")
