import itertools
import math
from collections import Counter

import numpy
import pytest
import torch

from dlm_tune.diffusion import (
    MASKINGS,
    NOISE_SCHEDULES,
    NoiseStream,
    corrupt,
    counter_uniform,
    enumerate_cross_entropy,
    enumerate_nelbo,
    noise_bank,
    summarise_replicates,
)
from tests.diffusion.exact import count_edges, integral_of_bernoulli
from tests.oracles import MASK, TableModel, any_order_nelbo, order_mixture_log_likelihood

LENGTH = 4
ROW = torch.tensor([2, 0, 1, 1])
EVERY = torch.ones(LENGTH, dtype=torch.bool)


@pytest.fixture(scope="module")
def table() -> TableModel:
    return TableModel(LENGTH)


def subset_nelbo(table: TableModel, row: torch.Tensor, target_mask: torch.Tensor = EVERY) -> float:
    return enumerate_nelbo(lambda noisy, masked: table.cross_entropy(row, noisy, masked), row, target_mask, MASK)


def test_enumeration_equals_the_mean_over_all_orders(table):
    assert subset_nelbo(table, ROW) == pytest.approx(any_order_nelbo(table, ROW), abs=1e-12)


def test_nelbo_bounds_the_order_mixture_which_is_normalised(table):
    total = 0.0
    for row in itertools.product(range(MASK), repeat=LENGTH):
        log_likelihood = order_mixture_log_likelihood(table, torch.tensor(row))
        total += math.exp(log_likelihood)
        assert subset_nelbo(table, torch.tensor(row)) > -log_likelihood
    assert total == pytest.approx(1, abs=1e-12)


def by_size(table: TableModel, row: torch.Tensor = ROW) -> torch.Tensor:
    return enumerate_cross_entropy(lambda noisy, masked: table.cross_entropy(row, noisy, masked), row, EVERY, MASK)


def integral_over_t(schedule: str, by_size: torch.Tensor, epsilon: float = 0.0) -> float:
    """E_t E_mask [w(t) CE] by Gauss-Legendre quadrature over t in (epsilon, 1), masks enumerated: no sampling."""
    nodes, quadrature = (torch.as_tensor(values) for values in numpy.polynomial.legendre.leggauss(200))
    root = (nodes + 1) / 2  # t goes with its fourth power, in which powers of t are smooth at 0
    t = epsilon + (1 - epsilon) * root**4
    p = 1 - NOISE_SCHEDULES[schedule].alpha(t)
    expected = sum(by_size[size] * p**size * (1 - p) ** (LENGTH - size) for size in range(1, LENGTH + 1))
    return float((NOISE_SCHEDULES[schedule].weight(t) * expected * 4 * root**3 * quadrature / 2).sum())


def test_cross_entropy_of_each_size_counts_every_set(table):
    by_count = enumerate_cross_entropy(lambda noisy, masked: torch.ones(int(masked.sum())), ROW, EVERY, MASK)
    assert by_count.tolist() == [0, 4, 12, 12, 4]


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_bernoulli_integral_is_the_same_number_for_every_schedule(table, schedule):
    """Geometric alone covers only mask probabilities between its ends, and by exactly that it falls short."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    low, high = (1 - NOISE_SCHEDULES[schedule].alpha(ends)).tolist()
    integral = integral_over_t(schedule, by_size(table))
    assert integral == pytest.approx(integral_of_bernoulli(by_size(table), low, high), abs=1e-9)
    exact = any_order_nelbo(table, ROW)
    if schedule == "geometric":
        h_full, fully_masked = by_size(table)[1].item(), by_size(table)[LENGTH].item()
        assert exact - integral == pytest.approx(1e-5 * h_full + math.exp(-20) * fully_masked, rel=1e-3)
    else:
        assert integral == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_exact_count_is_the_same_number_for_every_schedule(table, schedule):
    """The finite sum over counts and sets, with the drawn counts' law by bisection and the weights of `corrupt`."""
    edges = count_edges(NOISE_SCHEDULES[schedule], LENGTH)
    middles = (edges[1:] + edges[:-1]) / 2
    noisy = corrupt(
        ROW.expand(LENGTH, -1),
        EVERY.expand(LENGTH, -1),
        middles,
        torch.arange(LENGTH, dtype=torch.float64).expand(LENGTH, -1) / LENGTH,
        schedule=NOISE_SCHEDULES[schedule],
        masking="exact_count",
        mask_token_id=MASK,
    )
    sets_of_size = torch.tensor([math.comb(LENGTH, size) for size in range(1, LENGTH + 1)])
    nelbo = (edges.diff() * noisy.weights * by_size(table)[1:] / sets_of_size).sum().item()
    assert nelbo == pytest.approx(any_order_nelbo(table, ROW), abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_mdlm", "cosine_squared_mdlm", "polynomial"])
def test_bias_of_the_cut_off_is_as_documented(table, schedule):
    """`noise_epsilon * NELBO - p(noise_epsilon) * H_full` to first order."""
    epsilon = 1e-4
    p = 1 - NOISE_SCHEDULES[schedule].alpha(torch.tensor(epsilon, dtype=torch.float64)).item()
    nelbo, h_full = any_order_nelbo(table, ROW), by_size(table)[1].item()
    bias = integral_over_t(schedule, by_size(table), epsilon) - nelbo
    predicted = epsilon * nelbo - p * h_full
    assert bias == pytest.approx(predicted, abs=20 * epsilon**2)
    assert abs(predicted) > 100 * epsilon**2


def sampled(table, masking, num_samples, num_replicates, seed=0, rows=1, schedule="linear"):
    input_ids, target_mask = ROW.expand(rows, LENGTH), EVERY.expand(rows, LENGTH)
    samples = []
    for noisy in noise_bank(
        input_ids,
        target_mask,
        torch.arange(rows),
        seed=seed,
        num_samples=num_samples,
        num_replicates=num_replicates,
        mask_token_id=MASK,
        masking=masking,
        schedule=schedule,
    ):
        nll = table.cross_entropy(ROW, noisy.noisy_input_ids, noisy.masked)
        summed = torch.zeros(rows, dtype=torch.float64).index_add(0, noisy.masked.nonzero()[:, 0], nll)
        samples.append(noisy.weights * summed)
    return torch.stack(samples, dim=1)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("schedule", [name for name in NOISE_SCHEDULES if name != "log_linear"])
def test_sampled_estimates_are_unbiased(table, masking, schedule):
    """Mean over 3000 rows of the same tokens within 4 standard errors of the enumeration.

    The bias of `bernoulli` is of order `noise_epsilon * NELBO`, about 5e-3 here and below the error.
    """
    estimates, _ = summarise_replicates(sampled(table, masking, 8, 1, rows=3000, schedule=schedule), 1)
    exact = subset_nelbo(table, ROW)
    standard_error = estimates.std() / 3000**0.5
    assert standard_error < 0.1
    assert abs(estimates.mean() - exact) < 4 * standard_error


def test_standard_error_covers_the_enumeration(table):
    """95 % intervals from replicates cover the exact value for about 95 % of rows; 16 replicates, 400 rows."""
    nats, standard_error = summarise_replicates(sampled(table, "exact_count", 64, 16, rows=400), 16)
    covered = ((nats - subset_nelbo(table, ROW)).abs() < 2.131 * standard_error).double().mean()
    assert 0.91 < covered < 0.985


@pytest.mark.parametrize(("num_samples", "total"), [(4, 6), (2, 3), (16, 10)])
def test_every_mask_count_has_exactly_its_probability(num_samples, total):
    """Counts drawn by systematic strata are uniform on 1..A also where A is no multiple of the strata: chi-square."""
    rows = 6000
    counts = Counter()
    ones = torch.ones(rows, total, dtype=torch.bool)
    for noisy in noise_bank(
        torch.zeros(rows, total, dtype=torch.long),
        ones,
        torch.arange(rows),
        seed=1,
        num_samples=num_samples,
        mask_token_id=1,
    ):
        counts.update(noisy.masked.sum(1).tolist())
    expected = rows * num_samples / total
    # strata make the counts of one row more even than independent ones: the statistic is below the usual bound
    statistic = sum((counts[count] - expected) ** 2 / expected for count in range(1, total + 1))
    assert statistic < 2.2 * total + 8


def test_timesteps_are_systematic_in_a_replicate_and_independent_between_replicates():
    rows = 2000
    bank = noise_bank(
        torch.zeros(rows, 2, dtype=torch.long),
        torch.ones(rows, 2, dtype=torch.bool),
        torch.arange(rows),
        seed=0,
        num_samples=6,
        num_replicates=2,
        mask_token_id=1,
    )
    t = torch.stack([noisy.timesteps for noisy in bank], dim=1).view(rows, 2, 3)
    strata = (t * 3).long().sort(dim=2).values
    assert (strata == torch.arange(3)).all()
    torch.testing.assert_close(t.diff(dim=2) % 1, torch.full((rows, 2, 2), 1 / 3, dtype=torch.float64))
    assert abs(torch.corrcoef(t[:, :, 0].T)[0, 1]) < 4 / rows**0.5


def test_evaluation_masks_are_not_those_of_training():
    """The keys have the same form, so only the stream keeps row r, sample s apart from epoch r, row s."""
    keys, positions = torch.arange(4), torch.arange(64)
    input_ids, target_mask = torch.zeros(4, 64, dtype=torch.long), torch.ones(4, 64, dtype=torch.bool)
    bank = noise_bank(input_ids, target_mask, keys, seed=0, num_samples=4, mask_token_id=1)
    for sample, noisy in enumerate(bank):
        training = corrupt(
            input_ids,
            target_mask,
            noisy.timesteps,
            counter_uniform(0, NoiseStream.MASK, keys[:, None], sample, positions),
            schedule=NOISE_SCHEDULES["linear"],
            masking="exact_count",
            mask_token_id=1,
        )
        assert not torch.equal(training.masked, noisy.masked)


def test_one_target_token_has_no_variance():
    target_mask = torch.tensor([[False, True, False, False]])
    weights = [
        noisy.weights.item() * noisy.masked.sum().item()
        for noisy in noise_bank(ROW[None], target_mask, torch.tensor([5]), seed=0, num_samples=8, mask_token_id=MASK)
    ]
    assert weights == [1.0] * 8


def test_bank_does_not_depend_on_batch_mates():
    def bank(keys):
        return list(
            noise_bank(
                ROW.expand(len(keys), LENGTH),
                EVERY.expand(len(keys), LENGTH),
                torch.tensor(keys),
                seed=3,
                num_samples=6,
                mask_token_id=MASK,
            )
        )

    for together, alone in zip(bank([4, 9, 2]), bank([9]), strict=True):
        assert torch.equal(together.masked[1], alone.masked[0])
        assert together.weights[1] == alone.weights[0]


def test_replicates_must_divide_samples():
    with pytest.raises(ValueError, match="num_samples=7 must be a multiple of num_replicates=2"):
        next(
            noise_bank(
                ROW[None], EVERY[None], torch.tensor([0]), seed=0, num_samples=7, num_replicates=2, mask_token_id=3
            )
        )


def test_enumeration_refuses_long_rows():
    with pytest.raises(ValueError, match="A=17"):
        enumerate_nelbo(lambda *_: torch.zeros(1), torch.zeros(17).long(), torch.ones(17).bool(), MASK)


def test_bernoulli_and_exact_count_agree_on_rows_without_targets():
    noisy = corrupt(
        ROW[None],
        torch.zeros(1, LENGTH, dtype=torch.bool),
        torch.tensor([0.9], dtype=torch.float64),
        torch.zeros(1, LENGTH, dtype=torch.float64),
        schedule=NOISE_SCHEDULES["linear"],
        masking="exact_count",
        mask_token_id=MASK,
    )
    assert not noisy.masked.any()
    assert noisy.weights.item() == 0
