import math

import pytest
import torch

from dlm_tune.evaluation import estimate_nelbo, log_likelihood
from tests.tiny_models import tiny_dream, tiny_llada

ROWS = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]])
TARGETS = torch.tensor([[False, False, True, True, True, True], [False, True, True, False, True, False]])


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
@pytest.mark.parametrize("estimator", ["exact_count", "bernoulli"])
def test_sampling_agrees_with_enumeration_and_covers_it(make_model, estimator):
    model = make_model()
    exact = estimate_nelbo(model, ROWS, TARGETS, estimator="enumeration")
    sampled = estimate_nelbo(model, ROWS, TARGETS, num_samples=128, estimator=estimator)
    assert exact.standard_error.tolist() == [0, 0]
    assert exact.num_tokens.tolist() == sampled.num_tokens.tolist() == [4, 3]
    assert (sampled.standard_error < 0.3 * exact.nats).all()
    assert ((sampled.nats - exact.nats).abs() < 4 * sampled.standard_error).all()


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_one_target_is_exact_and_equals_the_dense_logits(make_model):
    model = make_model()
    position = 3
    target = torch.zeros_like(ROWS, dtype=torch.bool)
    target[:, position] = True
    estimate = estimate_nelbo(model, ROWS, target, num_samples=2)
    with torch.no_grad():
        logits = model(input_ids=ROWS.masked_fill(target, model.config.mask_token_id)).logits
    predictor = position - 1 if model.config.logits_shift else position
    expected = -logits[:, predictor].log_softmax(-1).gather(1, ROWS[:, position : position + 1])[:, 0]
    torch.testing.assert_close(estimate.nats, expected.double(), rtol=1e-5, atol=1e-6)
    assert estimate.standard_error.tolist() == [0, 0]


def test_same_seed_same_number_other_seed_other_number():
    model = tiny_llada()
    first, again, other = (estimate_nelbo(model, ROWS, TARGETS, num_samples=4, seed=seed).nats for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_padding_is_neither_attended_nor_scored():
    model = tiny_llada()
    padded = torch.cat([ROWS, torch.full((2, 3), 99)], dim=1)
    attention_mask = torch.tensor([1] * 6 + [0] * 3).expand(2, 9)
    with_padding = estimate_nelbo(model, padded, attention_mask=attention_mask, num_samples=8)
    without = estimate_nelbo(model, ROWS, num_samples=8)
    assert with_padding.num_tokens.tolist() == [6, 6]
    torch.testing.assert_close(with_padding.nats, without.nats, rtol=1e-5, atol=1e-5)


def test_left_padding_gives_the_noise_and_the_bound_of_right_padding():
    model = tiny_llada()
    padding = torch.full((2, 3), 99)
    left = estimate_nelbo(model, torch.cat([padding, ROWS], 1), attention_mask=torch.tensor([[0] * 3 + [1] * 6] * 2))
    right = estimate_nelbo(model, torch.cat([ROWS, padding], 1), attention_mask=torch.tensor([[1] * 6 + [0] * 3] * 2))
    torch.testing.assert_close(left.nats, right.nats, rtol=1e-5, atol=1e-5)


def test_shifted_model_does_not_score_its_first_token():
    assert estimate_nelbo(tiny_dream(), ROWS, num_samples=2).num_tokens.tolist() == [5, 5]
    with pytest.raises(ValueError, match="marks the first token of a row, which has no predictor"):
        estimate_nelbo(tiny_dream(), ROWS, torch.ones_like(ROWS, dtype=torch.bool))


def test_log_likelihood_is_minus_the_nelbo_whatever_the_batch_size():
    model = tiny_llada()
    prompts = [[10, 11], [], [30, 31, 32]]
    completions = [[12, 13, 14], [20, 21], []]
    alone = log_likelihood(model, prompts, completions, num_samples=8, batch_size=1)
    together = log_likelihood(model, prompts, completions, num_samples=8, batch_size=3)
    torch.testing.assert_close(alone.log_likelihood, together.log_likelihood, rtol=1e-5, atol=1e-5)
    assert together.num_tokens.tolist() == [3, 2, 0]
    assert together.log_likelihood[2] == 0
    target = torch.tensor([[False, False, True, True, True]])
    nelbo = estimate_nelbo(
        model, torch.tensor([[10, 11, 12, 13, 14]]), target, num_samples=8, row_keys=torch.tensor([0])
    )
    torch.testing.assert_close(together.log_likelihood[:1], -nelbo.nats, rtol=1e-5, atol=1e-5)


def test_training_mode_is_restored_and_dropout_is_off():
    model = tiny_llada().train()
    estimate_nelbo(model, ROWS, num_samples=2)
    assert model.training


def test_too_few_samples_for_an_error_give_nan():
    assert math.isnan(estimate_nelbo(tiny_llada(), ROWS, num_samples=1).standard_error[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"estimator": "ais"}, "estimator='ais' is unknown: choose one of exact_count, bernoulli, enumeration"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"target_mask": torch.ones(2, 3).bool()}, r"target_mask has shape \(2, 3\)"),
        (
            {"attention_mask": torch.tensor([[1] * 5 + [0]] * 2), "target_mask": torch.ones(2, 6).bool()},
            "target_mask marks padding",
        ),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        estimate_nelbo(tiny_llada(), ROWS, **arguments)


def test_prompts_and_completions_must_pair_up():
    with pytest.raises(ValueError, match="2 prompts but 1 completions and 2 row_keys"):
        log_likelihood(tiny_llada(), [[1], [2]], [[3]])
