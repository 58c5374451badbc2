import itertools
import math

import numpy
import pytest
import torch
from torch import Tensor

from dlm_tune.diffusion import (
    NOISE_SCHEDULES,
    absorbing_log_scores,
    discrete_time_bound,
    discrete_time_steps,
    enumerate_cross_entropy,
    enumerate_nelbo,
    geometric,
    score_entropy,
)
from tests.diffusion.exact import integral_of_bernoulli
from tests.oracles import MASK, TableModel

LENGTH = 4
ROW = torch.tensor([2, 0, 1, 1])
EVERY = torch.ones(LENGTH, dtype=torch.bool)
# the last one is far from both its ends: 0.1 % masked at t = 0, 37 % clean at t = 1
SCHEDULES = {**NOISE_SCHEDULES, "geometric_sedd": geometric(1e-3, 1.0)}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


class JointModel(TableModel):
    """The exact conditionals of a random joint distribution of four tokens."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(MASK**LENGTH, generator=generator, dtype=torch.float64)
        self.joint = dict(zip(itertools.product(range(MASK), repeat=LENGTH), logits.softmax(0).tolist(), strict=True))
        self.length = LENGTH
        self.table = {
            row: torch.stack([self.conditional(row, n) for n in range(LENGTH)])
            for row in itertools.product(range(MASK + 1), repeat=LENGTH)
        }

    def conditional(self, row: tuple[int, ...], position: int) -> Tensor:
        """(3,) log p(token at `position` | visible tokens of `row`)."""
        weights = torch.zeros(MASK, dtype=torch.float64)
        for clean, probability in self.joint.items():
            if all(token in (MASK, clean[n]) for n, token in enumerate(row)):
                weights[clean[position]] += probability
        return (weights / weights.sum()).log()


@pytest.fixture(scope="module")
def table() -> TableModel:
    return TableModel(LENGTH)


@pytest.fixture(scope="module")
def joint() -> JointModel:
    return JointModel()


def bound(model: TableModel, schedule, num_steps: int, row: Tensor = ROW, target_mask: Tensor = EVERY) -> float:
    return discrete_time_bound(
        lambda noisy, masked: model.cross_entropy(row, noisy, masked), row, target_mask, MASK, schedule, num_steps
    )


def nelbo_of(model: TableModel, row: Tensor = ROW, target_mask: Tensor = EVERY) -> float:
    return enumerate_nelbo(lambda noisy, masked: model.cross_entropy(row, noisy, masked), row, target_mask, MASK)


# D3PM: from transition matrices and Bayes' rule, with no formula of absorbing diffusion


def transition(clean: float) -> Tensor:
    """(4, 4) probabilities from state to state where a token stays with probability `clean`, else is masked."""
    matrix = clean * torch.eye(MASK + 1, dtype=torch.float64)
    matrix[:, MASK] += 1 - clean
    return matrix


def kl(q: Tensor, p: Tensor) -> float:
    support = q > 0
    return float((q[support] * (q[support] / p[support]).log()).sum())


def step_kl(model: TableModel, alpha_s: float, alpha_t: float) -> float:
    """E_{x_t ~ q} sum over tokens of KL(q(x_s | x_t, x_0) || p(x_s | x_t)), p mixing the posteriors over x_0."""
    from_s, to_s, to_t = transition(alpha_t / alpha_s), transition(alpha_s), transition(alpha_t)

    def posterior(clean: int, noisy: int) -> Tensor:
        weights = to_s[clean] * from_s[:, noisy]
        return weights / weights.sum()

    total = 0.0
    for bits in itertools.product([False, True], repeat=LENGTH):
        noisy = ROW.masked_fill(torch.tensor(bits), MASK)
        probability = math.prod(float(to_t[clean, state]) for clean, state in zip(ROW, noisy, strict=True))
        predicted = model.log_probs(noisy[None])[0].exp()
        for n in range(LENGTH):
            state = int(noisy[n])
            if state == MASK:
                model_step = sum(predicted[n, v] * posterior(v, MASK) for v in range(MASK))
            else:
                model_step = posterior(state, state)
            total += probability * kl(posterior(int(ROW[n]), state), model_step)
    return total


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@EVERY_SCHEDULE
def test_equals_the_kl_divergences_of_the_posteriors(table, schedule, num_steps):
    alpha = schedule.alpha(torch.arange(num_steps + 1, dtype=torch.float64) / num_steps).tolist()
    expected = sum(step_kl(table, alpha[i], alpha[i + 1]) for i in range(num_steps))
    # reconstruction -log p(x_0 | x_{t=0}): a step to alpha = 1, where the posterior is the clean token itself
    expected += step_kl(table, 1.0, alpha[0])
    # prior KL(q(x_1 | x_0) || p(x_1)): the model reveals a token of the fully masked row with probability alpha(1)
    fully_masked = torch.full((1, LENGTH), MASK)
    for n, log_probs in enumerate(table.log_probs(fully_masked)[0]):
        start = torch.cat([alpha[-1] * log_probs.exp(), torch.tensor([1 - alpha[-1]], dtype=torch.float64)])
        expected += kl(transition(alpha[-1])[ROW[n]], start)
    assert bound(table, schedule, num_steps) == pytest.approx(expected, abs=1e-9)


def log_likelihood(model: TableModel, schedule, num_steps: int, row: Tensor) -> float:
    """Exact log-probability that the T-step sampler writes `row`: a sum over all paths of visible sets."""
    alpha = [0.0, *schedule.alpha(1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps).tolist(), 1.0]
    sets = [torch.tensor(bits) for bits in itertools.product([False, True], repeat=LENGTH)]
    token_probabilities = [
        model.log_probs(row.masked_fill(~visible, MASK)[None])[0].gather(1, row[:, None])[:, 0].exp()
        for visible in sets
    ]
    reached = [0.0 if visible.any() else 1.0 for visible in sets]
    for noisier, cleaner in itertools.pairwise(alpha):
        reveal = (cleaner - noisier) / (1 - noisier) if noisier < 1 else 0.0
        following = [0.0] * len(sets)
        for i, before in enumerate(sets):
            for j, after in enumerate(sets):
                if reached[i] and not (before & ~after).any():
                    new, hidden = after & ~before, int((~after).sum())
                    step = float((reveal * token_probabilities[i][new]).prod()) * (1 - reveal) ** hidden
                    following[j] += reached[i] * step
        reached = following
    return math.log(reached[-1])  # the last set is the fully visible one


@pytest.mark.parametrize("name", ["linear", "cosine", "geometric_sedd"])
def test_bounds_the_exact_likelihood_of_the_sampler(table, name):
    """The likelihoods of all 81 rows sum to one, and the bound lies above each."""
    total = 0.0
    for tokens in itertools.product(range(MASK), repeat=LENGTH):
        row = torch.tensor(tokens)
        exact = log_likelihood(table, SCHEDULES[name], 3, row)
        total += math.exp(exact)
        assert bound(table, SCHEDULES[name], 3, row) >= -exact - 1e-12
    assert total == pytest.approx(1, abs=1e-12)


@EVERY_SCHEDULE
def test_tends_to_the_nelbo(table, schedule):
    """The error of a Riemann sum is of first order: a hundred times the steps, a hundredth of the error.

    Beyond the ends of a schedule, reconstruction and prior are one coarse cell each, which no T makes finer.
    """
    by_size = enumerate_cross_entropy(lambda noisy, masked: table.cross_entropy(ROW, noisy, masked), ROW, EVERY, MASK)
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    low, high = 1 - ends[0], 1 - ends[1]
    reconstruction = sum(low**k * (1 - low) ** (LENGTH - k) * float(by_size[k]) for k in range(1, LENGTH + 1))
    limit = reconstruction + integral_of_bernoulli(by_size, low, high) + ends[1] * float(by_size[LENGTH])
    if ends[1] < 1e-6:
        assert limit == pytest.approx(nelbo_of(table), abs=1e-6)
    coarse, fine = (bound(table, schedule, num_steps) - limit for num_steps in (50, 5000))
    assert abs(coarse) > 1e-4
    assert abs(fine) < abs(coarse) / 50


@EVERY_SCHEDULE
def test_decreases_with_the_steps_on_average_over_data(joint, schedule):
    """T, 2T, 4T, ...: never below the entropy, which is the mean NELBO of the right denoiser."""
    entropy = -sum(p * math.log(p) for p in joint.joint.values())
    means = [
        sum(p * bound(joint, schedule, num_steps, torch.tensor(row)) for row, p in joint.joint.items())
        for num_steps in (1, 2, 4, 8)
    ]
    assert all(more > fewer > entropy for more, fewer in itertools.pairwise(means))


def test_only_targets_are_scored(table):
    target_mask = torch.tensor([False, True, False, True])
    few, many = (bound(table, SCHEDULES["linear"], steps, target_mask=target_mask) for steps in (1, 20_000))
    assert many == pytest.approx(nelbo_of(table, target_mask=target_mask), abs=1e-3)
    masked = target_mask[None]
    assert few == pytest.approx(float(table.cross_entropy(ROW, ROW[None].masked_fill(masked, MASK), masked).sum()))


@EVERY_SCHEDULE
def test_weights_of_the_steps_cover_all_tokens(schedule):
    """A cross-entropy of 1 everywhere costs one nat per token: `sum weight_i p_i = 1`, ends included."""
    mask_probability, weights = discrete_time_steps(schedule, 7)
    assert mask_probability.shape == weights.shape == (9,)
    assert (weights @ mask_probability).item() == pytest.approx(1, abs=1e-12)
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert weights[0].item() == pytest.approx(1.0 if ends[0] < 1 - 1e-9 else 0.0)
    assert weights[-1].item() == pytest.approx(ends[1])


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        discrete_time_steps(SCHEDULES["linear"], 0)


# Score entropy


@pytest.fixture
def scored():
    """Log-probabilities, targets and timesteps of 50 masked tokens, and scores with a free normaliser."""
    generator = torch.Generator().manual_seed(1)
    log_probs = torch.randn(50, 5, generator=generator, dtype=torch.float64).log_softmax(1)
    target_ids = torch.randint(5, (50,), generator=generator)
    timesteps = torch.rand(50, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    log_scores = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    return log_probs, target_ids, timesteps, log_scores


@EVERY_SCHEDULE
def test_score_entropy_equals_its_definition(schedule, scored):
    """sum over y != x of Q_t(x, y) [s_y - r_y log s_y + r_y (log r_y - 1)], with rates by autograd."""
    _, target_ids, timesteps, log_scores = scored
    found = score_entropy(log_scores, target_ids, timesteps, schedule)
    for n, t in enumerate(timesteps):
        t = t.clone().requires_grad_()
        alpha = schedule.alpha(t)
        (rate,) = torch.autograd.grad(-alpha.log(), t, retain_graph=True)
        marginal = [alpha.item() if v == target_ids[n] else 0.0 for v in range(5)]  # q(y | x_0)
        total = 0.0
        for v in range(5):
            ratio = marginal[v] / (1 - alpha.item())
            constant = ratio * (math.log(ratio) - 1) if ratio else 0.0
            total += rate.item() * (log_scores[n, v].exp().item() - ratio * log_scores[n, v].item() + constant)
        assert found[n].item() == pytest.approx(total, rel=1e-9)


@EVERY_SCHEDULE
def test_score_entropy_of_a_denoiser_is_the_integrand_of_the_nelbo(schedule, scored):
    """Token by token and for every t: score entropy = weight(t) * cross-entropy, its constants included."""
    log_probs, target_ids, timesteps, _ = scored
    found = score_entropy(absorbing_log_scores(log_probs, timesteps, schedule), target_ids, timesteps, schedule)
    expected = schedule.weight(timesteps) * -log_probs.gather(1, target_ids[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@EVERY_SCHEDULE
def test_score_entropy_is_least_for_normalised_scores(schedule, scored):
    """Never negative; and of all multiples of the scores the one that sums to the true ratio is the best."""
    _, target_ids, timesteps, log_scores = scored
    free = score_entropy(log_scores, target_ids, timesteps, schedule)
    normalised = absorbing_log_scores(log_scores.log_softmax(1), timesteps, schedule)
    best = score_entropy(normalised, target_ids, timesteps, schedule)
    assert (best > 0).all()
    assert (free > best).all()
    for shift in (-1e-3, 1e-3):
        assert (score_entropy(normalised + shift, target_ids, timesteps, schedule) > best).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_squared_mdlm"])
def test_score_entropy_integrates_to_the_nelbo(table, name):
    """E_t E_mask of the summed score entropy, t by Gauss-Legendre quadrature and the masks enumerated."""
    schedule = SCHEDULES[name]
    nodes, quadrature = (torch.as_tensor(values) for values in numpy.polynomial.legendre.leggauss(60))
    integral = 0.0
    for t, share in zip((nodes + 1) / 2, quadrature / 2, strict=True):
        p = 1 - schedule.alpha(t).item()
        for bits in itertools.product([False, True], repeat=LENGTH):
            masked, size = torch.tensor(bits), sum(bits)
            if size:
                timesteps = t.expand(size)
                log_probs = table.log_probs(ROW.masked_fill(masked, MASK)[None])[0][masked]
                log_scores = absorbing_log_scores(log_probs, timesteps, schedule)
                summed = score_entropy(log_scores, ROW[masked], timesteps, schedule).sum().item()
                integral += share.item() * p**size * (1 - p) ** (LENGTH - size) * summed
    assert integral == pytest.approx(nelbo_of(table), abs=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_scores_are_ratios_of_marginals(joint, name):
    """RADD: `s(v) = p_t(row with v) / p_t(row with a mask)`, the marginals of x_t by enumeration of all clean rows."""
    schedule, t = SCHEDULES[name], torch.tensor([0.4], dtype=torch.float64)
    alpha = schedule.alpha(t).item()

    def marginal(noisy: tuple[int, ...]) -> float:
        """p_t(x_t = noisy)."""
        total = 0.0
        for clean, probability in joint.joint.items():
            tokens = zip(clean, noisy, strict=True)
            total += probability * math.prod((1 - alpha) if y == MASK else alpha * (x == y) for x, y in tokens)
        return total

    for noisy in ((MASK, 0, 1, MASK), (MASK, MASK, MASK, MASK), (MASK, 2, 2, 0)):
        log_probs = joint.log_probs(torch.tensor([noisy]))[0, :1]
        scores = absorbing_log_scores(log_probs, t, schedule)[0].exp().tolist()
        ratios = [marginal((v, *noisy[1:])) / marginal(noisy) for v in range(MASK)]
        assert scores == pytest.approx(ratios, rel=1e-12)
