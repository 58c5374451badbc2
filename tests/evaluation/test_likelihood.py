import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

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


# Guidance


def guided_log_probs(model, row, targets, masked, scale):
    """(L, V) log-probabilities of the masked tokens, by the formula on the dense logits of two rows."""
    mask_id, keep = model.config.mask_token_id, getattr(model.config, "guidance_keep_token_ids", [])
    noisy = row.masked_fill(masked, mask_id)
    hidden = noisy.masked_fill(~targets & ~torch.isin(row, torch.tensor(keep, dtype=torch.long)), mask_id)
    branches = []
    for tokens in (noisy, hidden):
        logits = model(input_ids=tokens[None]).logits[0]
        if model.config.logits_shift:
            logits = torch.cat([logits[:1], logits[:-1]])
        branches.append(logits.log_softmax(-1))
    guided = (1 + scale) * branches[0] - scale * branches[1]
    guided[:, mask_id] = -math.inf
    return guided.log_softmax(-1)


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0])
@torch.no_grad()
def test_a_guided_nelbo_is_that_of_guided_sampling_in_random_order(make_model, scale):
    """Mean over all orders of the guided chain rule; it bounds the mixture over orders, which that sampler draws."""
    model = make_model(seed=3).double()
    row, targets = ROWS[0], TARGETS[1]
    places = targets.nonzero()[:, 0].tolist()
    orders = []
    for order in itertools.permutations(places):
        masked, total = targets.clone(), 0.0
        for place in order:
            total += float(guided_log_probs(model, row, targets, masked, scale)[place, row[place]])
            masked[place] = False
        orders.append(total)
    estimate = estimate_nelbo(model, row[None], targets[None], estimator="enumeration", guidance_scale=scale)
    assert float(estimate.nats) == pytest.approx(-sum(orders) / len(orders), abs=1e-10)
    mixture = math.log(sum(map(math.exp, orders)) / len(orders))
    assert float(estimate.nats) >= -mixture
    sampled = estimate_nelbo(model, row[None], targets[None], num_samples=64, guidance_scale=scale)
    assert abs(float(sampled.nats - estimate.nats)) < 4 * float(sampled.standard_error)


@pytest.mark.parametrize("keep", [[], [10, 31]])
@torch.no_grad()
def test_guided_scores_of_one_token_are_the_formula_whatever_the_batch(keep):
    model = tiny_llada(seed=3).double()
    model.config.guidance_keep_token_ids = keep
    prompts, completions = [[10, 11], [], [30, 31, 32, 33]], [[12], [20], [5]]
    scores = log_likelihood(model, prompts, completions, num_samples=2, guidance_scale=1.5)
    for prompt, completion, score in zip(prompts, completions, scores.log_likelihood.tolist(), strict=True):
        row = torch.tensor(prompt + completion)
        targets = torch.arange(len(row)) == len(prompt)
        expected = guided_log_probs(model, row, targets, targets, 1.5)[-1, completion[0]]
        assert score == pytest.approx(float(expected), abs=1e-10)
    alone = log_likelihood(model, prompts, completions, num_samples=2, guidance_scale=1.5, batch_size=1)
    torch.testing.assert_close(alone.log_likelihood, scores.log_likelihood, rtol=0, atol=1e-10)


def test_without_guidance_the_bound_is_the_same_to_the_bit():
    model = tiny_llada()
    plain = estimate_nelbo(model, ROWS, TARGETS, num_samples=4)
    assert estimate_nelbo(model, ROWS, TARGETS, num_samples=4, guidance_scale=0.0).nats.equal(plain.nats)
    guided = estimate_nelbo(model, ROWS, TARGETS, num_samples=4, guidance_scale=1.0)
    assert not guided.nats.equal(plain.nats)


def test_guided_scores_in_chunks_and_with_a_softcap(monkeypatch):
    model = tiny_llada(seed=3).double()
    whole = estimate_nelbo(model, ROWS, TARGETS, num_samples=4, guidance_scale=1.0).nats
    monkeypatch.setattr("dlm_tune.evaluation.likelihood.MAX_CHUNK_LOGITS", 256)
    chunks = estimate_nelbo(model, ROWS, TARGETS, num_samples=4, guidance_scale=1.0).nats
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-12)
    model.config.final_logit_softcapping = 0.5
    assert not torch.allclose(estimate_nelbo(model, ROWS, TARGETS, num_samples=4, guidance_scale=1.0).nats, whole)


def test_an_adapter_is_scored_under_guidance():
    base = tiny_llada(seed=3)
    plain = estimate_nelbo(base, ROWS, TARGETS, num_samples=4, guidance_scale=1.0).nats
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    adapted = estimate_nelbo(model, ROWS, TARGETS, num_samples=4, guidance_scale=1.0).nats
    assert not torch.allclose(adapted, plain)
    with model.disable_adapter():
        torch.testing.assert_close(
            estimate_nelbo(model, ROWS, TARGETS, num_samples=4, guidance_scale=1.0).nats, plain, rtol=1e-6, atol=1e-6
        )


def test_guidance_needs_a_condition_and_a_finite_scale():
    model = tiny_llada()
    with pytest.raises(ValueError, match=r"guidance_scale=1.0 has nothing to strengthen"):
        estimate_nelbo(model, ROWS, num_samples=2, guidance_scale=1.0)
    with pytest.raises(ValueError, match=r"guidance_scale=nan.*finite"):
        estimate_nelbo(model, ROWS, TARGETS, num_samples=2, guidance_scale=math.nan)
    model.config.guidance_keep_token_ids = [10]
    with pytest.raises(ValueError, match="nothing to strengthen"):
        log_likelihood(model, [[10], []], [[3], [4]], num_samples=2, guidance_scale=1.0)
