"""Guidance by a classifier against enumeration: posteriors of a table, linear classifiers, and what is refused."""

import itertools

import pytest
import torch
from torch import nn

from dlm_tune.diffusion import ClassifierGuidance, classifier_guided_logits
from tests.generation.bayes_classifier import BayesClassifier
from tests.generation.table_model import JointModel

MASK = 3
STATES = [state for state in itertools.product(range(4), repeat=3) if MASK in state]


@pytest.fixture(scope="module")
def joint_model():
    return JointModel()


def bayes(model, label=0):
    return BayesClassifier(model, torch.full((len(STATES),), label))


def guide(model, states, log_prob, **options):
    """Guided probabilities `(N, V + 1)` at all masks of some states, with the mask token's logit the largest."""
    ids = torch.tensor(states)
    position_mask = ids == MASK
    logits = model(ids, None, position_mask).logits
    guided = classifier_guided_logits(
        logits, ids, position_mask, ClassifierGuidance(log_prob, **options), forbidden_ids=[MASK]
    )
    return guided.softmax(-1)


def masked_positions():
    """(state, column) of each of the N positions, in row-major order."""
    return [(state, column) for state in STATES for column in range(3) if state[column] == MASK]


def unguided(model, state, column):
    """(V + 1,) probabilities of the denoiser, 0 for the mask."""
    return torch.tensor([*model.probabilities(state)[column], 0.0], dtype=torch.float64)


def with_token(state, column, token):
    return (*state[:column], token, *state[column + 1 :])


@pytest.mark.parametrize("label", [0, 1, 2])
def test_one_token_follows_its_posterior_given_the_class(joint_model, label):
    """Independent of Bayes' rule on tokens: conditionals of the posterior table p(x | y) itself."""
    classifier = bayes(joint_model, label)
    guided = guide(joint_model, STATES, classifier)
    largest_change = 0.0
    for n, (state, column) in enumerate(masked_positions()):
        mass = torch.zeros(4, dtype=torch.float64)
        for row, probability in zip(joint_model.rows, classifier.posteriors[label], strict=True):
            if all(seen in (MASK, token) for seen, token in zip(state, row, strict=True)):
                mass[row[column]] += probability
        expected = mass / mass.sum()
        torch.testing.assert_close(guided[n], expected, rtol=0, atol=1e-12)
        change = (expected - unguided(joint_model, state, column)).abs().max()
        largest_change = max(largest_change, float(change))
    assert largest_change > 0.3


@pytest.mark.parametrize("label", [0, 1, 2])
def test_one_token_at_a_time_gives_the_joint_posterior_in_every_order(joint_model, label):
    classifier = bayes(joint_model, label)
    guided = guide(joint_model, STATES, classifier)
    places = {place: n for n, place in enumerate(masked_positions())}
    for order in itertools.permutations(range(3)):
        for row, expected in zip(joint_model.rows, classifier.posteriors[label].tolist(), strict=True):
            state, probability = (MASK,) * 3, 1.0
            for column in order:
                probability *= float(guided[places[state, column], row[column]])
                state = with_token(state, column, row[column])
            assert probability == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_scale_is_the_power_of_the_class_probability(joint_model, scale):
    classifier = bayes(joint_model)
    guided = guide(joint_model, STATES, classifier, scale=scale)
    for n, (state, column) in enumerate(masked_positions()):
        p = unguided(joint_model, state, column)[:3]
        following = torch.tensor([joint_model.states.index(with_token(state, column, v)) for v in range(3)])
        weights = p * classifier.p_y_given_state[following, 0] ** scale
        torch.testing.assert_close(guided[n, :3], weights / weights.sum(), rtol=0, atol=1e-12)
    assert (guided[:, MASK] == 0).all()


def test_scale_zero_is_the_model_and_asks_nobody(joint_model):
    logits = joint_model.conditionals[:1, 0].log()
    guidance = ClassifierGuidance(lambda *_: pytest.fail("called"), scale=0.0)
    ids = torch.full((1, 3), MASK)
    assert classifier_guided_logits(logits, ids, torch.tensor([[True, False, False]]), guidance) is logits


@pytest.mark.parametrize("batch_size", [1, 7, 64, 10_000])
def test_evaluations_are_cut_into_calls_of_one_size(joint_model, batch_size):
    classifier = bayes(joint_model)
    num_sequences = 3 * len(masked_positions())
    expected = guide(joint_model, STATES, bayes(joint_model), batch_size=num_sequences)
    assert guide(joint_model, STATES, classifier, batch_size=batch_size).equal(expected)
    assert classifier.num_sequences == num_sequences
    assert classifier.num_calls == -(-num_sequences // batch_size)


@pytest.mark.parametrize("top_k", [1, 2, 3, 50])
def test_top_k_is_the_guided_law_cut_to_the_best_tokens_of_the_denoiser(joint_model, top_k):
    classifier = bayes(joint_model)
    cut = guide(joint_model, STATES, classifier, top_k=top_k)
    assert classifier.num_sequences == min(top_k, 3) * len(masked_positions())
    for n, (state, column) in enumerate(masked_positions()):
        p = unguided(joint_model, state, column)[:3]
        expected = guide(joint_model, [state], classifier)[[c for c in range(3) if state[c] == MASK].index(column), :3]
        expected = expected.where(p >= p.sort(descending=True).values[min(top_k, 3) - 1], 0.0)
        torch.testing.assert_close(cut[n, :3], expected / expected.sum(), rtol=0, atol=1e-12)


def linear_classifier(seed=0, scale=1.0):
    """Weights `(L, V + 1)` of a score that is linear in each one-hot row."""
    return scale * torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_first_order_is_exact_for_a_linear_score(joint_model):
    weights = linear_classifier()

    def of_ids(input_ids, attention_mask, rows):
        return weights[torch.arange(3), input_ids].sum(1)

    def of_one_hots(one_hots, attention_mask, rows):
        return (one_hots * weights).sum((1, 2))

    exact = guide(joint_model, STATES, of_ids, scale=1.7)
    first_order = guide(joint_model, STATES, of_one_hots, scale=1.7, method="first_order")
    torch.testing.assert_close(first_order, exact, rtol=0, atol=1e-12)
    assert not torch.allclose(exact, guide(joint_model, STATES, of_ids, scale=0.1), atol=0.05)


def test_first_order_of_a_logistic_classifier_is_its_derivative(joint_model):
    """log sigmoid(s) has the derivative sigmoid(-s): the ratio of v is sigmoid(-s(x_t)) (W[l, v] - W[l, mask])."""
    weights = linear_classifier()

    def log_prob(one_hots, attention_mask, rows):
        return nn.functional.logsigmoid((one_hots * weights).sum((1, 2)))

    guided = guide(joint_model, STATES, log_prob, method="first_order", batch_size=5)
    for n, (state, column) in enumerate(masked_positions()):
        slope = torch.sigmoid(-sum(weights[i, v] for i, v in enumerate(state)))
        ratio = slope * (weights[column] - weights[column, MASK])
        p = unguided(joint_model, state, column)[:3]
        expected = p * ratio[:3].exp()
        torch.testing.assert_close(guided[n, :3], expected / expected.sum(), rtol=0, atol=1e-12)


def test_the_error_of_the_first_order_is_of_the_second(joint_model):
    def errors(scale):
        weights = linear_classifier(scale=scale)

        def of_ids(input_ids, attention_mask, rows):
            return nn.functional.logsigmoid(weights[torch.arange(3), input_ids].sum(1))

        def of_one_hots(one_hots, attention_mask, rows):
            return nn.functional.logsigmoid((one_hots * weights).sum((1, 2)))

        exact = guide(joint_model, STATES, of_ids)
        return (guide(joint_model, STATES, of_one_hots, method="first_order") - exact).abs().max()

    assert errors(0.01) > 0
    assert errors(0.02) / errors(0.01) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_first_order_differentiates_in_any_mode_and_leaves_no_gradients(joint_model, mode):
    layer = nn.Linear(12, 2).double()

    def log_prob(one_hots, attention_mask, rows):
        attended = one_hots * attention_mask[:, :, None]
        return layer(attended.flatten(1)).log_softmax(-1)[:, 1]

    expected = guide(joint_model, STATES, log_prob, method="first_order")
    with mode():
        guided = guide(joint_model, STATES, log_prob, method="first_order")
    assert guided.equal(expected)
    assert not guided.requires_grad
    assert layer.weight.grad is None


def test_the_exact_method_keeps_no_graph(joint_model):
    layer = nn.Linear(3, 1).double()
    guided = guide(joint_model, STATES, lambda ids, attention_mask, rows: layer(ids.double()).squeeze(1))
    assert not guided.requires_grad


@pytest.mark.parametrize("method", ["exact", "first_order"])
def test_the_classifier_is_told_padding_and_rows(method):
    """Three rows of the same tokens; the score of row r is r times the attended count of token 1."""
    ids = torch.tensor([[1, 1, MASK], [1, 1, MASK], [1, 1, MASK]])
    attention_mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    seen = []

    def log_prob(inputs, attention_mask, rows):
        one_hots = inputs if inputs.ndim == 3 else nn.functional.one_hot(inputs, 4).double()
        seen.append({(int(row), *mask.tolist()) for row, mask in zip(rows, attention_mask, strict=True)})
        return rows * (one_hots[:, :, 1] * attention_mask).sum(1)

    logits = torch.zeros(3, 4, dtype=torch.float64)
    guided = classifier_guided_logits(
        logits,
        ids,
        ids == MASK,
        ClassifierGuidance(log_prob, scale=0.5, method=method),
        attention_mask=attention_mask,
        rows=torch.tensor([5, 0, 9]),
        forbidden_ids=[MASK],
    )
    difference = guided[:, 1] - guided[:, 0]
    torch.testing.assert_close(difference, torch.tensor([2.5, 0.0, 4.5], dtype=torch.float64))
    assert set.union(*seen) == {(5, 0, 1, 1), (0, 1, 1, 1), (9, 1, 1, 1)}


def test_impossible_and_forbidden_tokens_stay_out_without_nan(joint_model):
    def never_zero(input_ids, attention_mask, rows):
        return torch.where((input_ids == 0).any(1), -torch.inf, 0.0)

    guided = guide(joint_model, [(MASK, 1, 2)], never_zero)
    expected = unguided(joint_model, (MASK, 1, 2), 0) * torch.tensor([0, 1, 1, 1])
    torch.testing.assert_close(guided[0], expected / expected.sum(), rtol=0, atol=1e-12)
    logits = torch.tensor([[0.0, -torch.inf, 0.0, 9.0]])
    guidance = ClassifierGuidance(never_zero)
    ids = torch.tensor([[MASK, 1, 2]])
    result = classifier_guided_logits(logits, ids, ids == MASK, guidance, forbidden_ids=[MASK, 77])
    assert result.tolist() == [[-torch.inf, -torch.inf, 0.0, -torch.inf]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["exact", "first_order"])
def test_the_sum_is_taken_in_float32_or_better(dtype, method):
    ids = torch.tensor([[MASK]])

    def log_prob(inputs, attention_mask, rows):
        one_hots = inputs if inputs.ndim == 3 else nn.functional.one_hot(inputs, 4).float()
        return (one_hots @ torch.tensor([0.0, 1e-3, 0.0, 0.0], dtype=one_hots.dtype)).sum(1)

    logits = torch.full((1, 4), 8.0, dtype=dtype)
    guided = classifier_guided_logits(logits, ids, ids == MASK, ClassifierGuidance(log_prob, method=method))
    assert guided.dtype == torch.promote_types(dtype, torch.float32)
    assert float(guided[0, 1] - guided[0, 0]) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"log_prob": 3}, ["log_prob=3", "callable"]),
        ({"scale": -1.0}, ["scale=-1.0", "log(1 - p(y | x))"]),
        ({"scale": float("nan")}, ["scale=nan"]),
        ({"scale": True}, ["scale=True"]),
        ({"method": "first_ordr"}, ["'first_ordr'", "Did you mean 'first_order'?"]),
        ({"top_k": 0}, ["top_k=0", "1 or more"]),
        ({"top_k": 5, "method": "first_order"}, ["top_k=5", "no effect"]),
        ({"batch_size": 0}, ["batch_size=0", "1 or more"]),
        ({"batch_size": 0, "scale": -2}, ["2 problems", "batch_size=0", "scale=-2"]),
    ],
)
def test_wrong_fields_are_named_together(fields, words):
    with pytest.raises(ValueError) as error:
        ClassifierGuidance(**({"log_prob": lambda *_: None} | fields))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("log_prob", "options", "words"),
    [
        (lambda ids, *_: torch.zeros(len(ids), 2), {}, ["shape (9, 2)", "(9,)"]),
        (lambda ids, *_: torch.zeros(len(ids), dtype=torch.long), {}, ["torch.int64", "float tensor"]),
        (lambda ids, *_: 0.5, {}, ["type float"]),
        (lambda ids, *_: torch.full((len(ids),), torch.nan), {}, ["returned nan", "log_softmax"]),
        (lambda ids, *_: torch.full((len(ids),), torch.inf), {}, ["returned inf"]),
        (lambda ids, *_: torch.full((len(ids),), -torch.inf), {}, ["position 0", "row 0", "clamp"]),
        (lambda x, *_: x.argmax(-1).double().sum(1), {"method": "first_order"}, ["without a gradient", "argmax"]),
        (lambda x, *_: x.sum((1, 2)).detach(), {"method": "first_order"}, ["without a gradient"]),
        (lambda x, *_: (x[:, 0, 0] - 1).log(), {"method": "first_order"}, ["nan"]),
        (lambda x, *_: x[:, 0, 0].sqrt(), {"method": "first_order"}, ["gradient of log_prob"]),
    ],
)
def test_scores_that_cannot_guide_are_refused(joint_model, log_prob, options, words):
    with pytest.raises(ValueError) as error:
        guide(joint_model, [(MASK, MASK, MASK)], log_prob, **options)
    for word in words:
        assert word in str(error.value)


def test_a_narrow_top_k_is_named_where_it_excludes_everything(joint_model):
    best = max(range(3), key=lambda v: joint_model.probabilities((MASK, 1, 2))[0][v])

    def log_prob(input_ids, *_):
        return torch.where(input_ids[:, 0] == best, -torch.inf, 0.0)

    with pytest.raises(ValueError, match="raise top_k"):
        guide(joint_model, [(MASK, 1, 2)], log_prob, top_k=1)
