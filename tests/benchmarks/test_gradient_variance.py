"""The variances of the benchmark against batches drawn with the library's own samplers, on tables of gradients."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from dlm_tune.diffusion import TIMESTEP_SAMPLERS, corrupt

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gradient_variance as benchmark  # noqa: E402
from gradient_variance_tasks import load_task_model, pad_rows  # noqa: E402

NUM_ROWS, NUM_TARGETS, WIDTH = 4, 3, 5


@pytest.fixture(scope="module")
def table():
    """(rows, 2^A, width): the gradient of each row for each masked set, with a part common to rows of like count."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(NUM_ROWS, 2**NUM_TARGETS, WIDTH, generator=generator, dtype=torch.float64)
    common = torch.randn(NUM_TARGETS + 1, WIDTH, generator=generator, dtype=torch.float64)
    for subset in range(2**NUM_TARGETS):
        table[:, subset] += 2 * common[subset.bit_count()]
    table[:, 0] = 0
    return table


@pytest.fixture(scope="module")
def draws(table):
    """Expectations in place of draws: one bin for each count, two equal replicates."""
    shape = 2, NUM_TARGETS, NUM_ROWS
    norms, complements = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    means = torch.zeros(*shape, WIDTH, dtype=torch.float64)
    for count in range(1, NUM_TARGETS + 1):
        subsets = [subset for subset in range(2**NUM_TARGETS) if subset.bit_count() == count]
        others = [2**NUM_TARGETS - 1 - subset for subset in subsets]
        norms[:, count - 1] = table[:, subsets].square().sum(dim=2).mean(dim=1)
        complements[:, count - 1] = (table[:, subsets] * table[:, others]).sum(dim=2).mean(dim=1)
        means[:, count - 1] = table[:, subsets].mean(dim=1)
    counts = torch.arange(1, NUM_TARGETS + 1)[None, :, None].expand(shape)
    widths = torch.ones(NUM_TARGETS, dtype=torch.float64)
    return benchmark.Draws(counts, widths, norms, means, complements, torch.ones(shape), NUM_TARGETS)


@pytest.fixture(scope="module")
def variances(draws):
    """Noise variance by name, not as a ratio: LLaDA's is sampled too roughly to divide by."""
    same, _ = benchmark.mean_gradients(draws)
    result = {}
    for name, estimator in benchmark.ESTIMATORS.items():
        moment = benchmark.each_replicate(draws, benchmark.second_moments(estimator, NUM_TARGETS), draws.norms)
        covariances = benchmark.row_covariances(estimator, NUM_TARGETS, NUM_ROWS)
        if covariances is not None:
            moment = moment + benchmark.cross_row(draws, covariances)
        result[name] = float(moment[0] - same[0, 1])
    return result


def drawn(table, estimator, num_batches):
    """(num_batches, width) batch gradients with the masks and weights of `corrupt` and of the timestep sampler."""
    slots = torch.arange(NUM_ROWS)
    sampler = TIMESTEP_SAMPLERS[estimator.timestep_sampling]
    timesteps = torch.cat([sampler(0, step, slots, NUM_ROWS) for step in range(num_batches)])
    shape = len(timesteps), NUM_TARGETS
    noisy = corrupt(
        torch.ones(shape, dtype=torch.long),
        torch.ones(shape, dtype=torch.bool),
        timesteps,
        torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        schedule=estimator.schedule,
        masking=estimator.masking,
        mask_token_id=0,
        noise_epsilon=benchmark.EPSILON,
    )
    subsets = (noisy.masked * 2 ** torch.arange(NUM_TARGETS)).sum(dim=1)
    gradients = table[slots.repeat(num_batches), subsets] * noisy.weights[:, None]
    return gradients.view(num_batches, NUM_ROWS, -1).sum(dim=1)


@pytest.mark.parametrize(
    "name",
    ["exact count, uniform", "exact count, stratified", "exact count, systematic", "exact count, antithetic"]
    + ["exact count, stratified, power 1.5", "bernoulli, stratified"],
)
def test_variance_is_that_of_drawn_batches(table, variances, name):
    gradients = drawn(table, benchmark.ESTIMATORS[name], 3000)
    deviations = (gradients - gradients.mean(dim=0)).square().sum(dim=1)
    error = float(deviations.std()) / len(deviations) ** 0.5
    assert error < 0.15 * variances[name]
    assert abs(float(deviations.mean()) - variances[name]) < 4 * error


def test_couplings_matter_in_this_test(variances):
    """Else the test above would pass without the covariances between rows."""
    assert variances["exact count, stratified"] < 0.7 * variances["exact count, uniform"]


@pytest.mark.parametrize("name", [name for name in benchmark.ESTIMATORS if name.startswith("exact")])
def test_every_proposal_over_counts_is_unbiased(name):
    """`q(l) w(l) = 1 / l`, the coefficient of the NELBO, and q sums to one."""
    schedule = benchmark.ESTIMATORS[name].schedule
    q = benchmark.count_probabilities(schedule, 7)
    counts = torch.arange(1, 8)
    assert float(q.sum()) == pytest.approx(1, abs=1e-12)
    # each count at a timestep in the middle of its range: the library's own weight
    timesteps = q.cumsum(0) - q / 2
    noisy = corrupt(
        torch.ones(7, 7, dtype=torch.long),
        torch.ones(7, 7, dtype=torch.bool),
        timesteps,
        torch.rand(7, 7, dtype=torch.float64),
        schedule=schedule,
        masking="exact_count",
        mask_token_id=0,
    )
    assert noisy.masked.sum(dim=1).tolist() == counts.tolist()
    assert torch.allclose(q * noisy.weights, 1 / counts.double(), atol=1e-9)


def test_complementary_pair_against_enumeration(table, draws):
    second = 0.0
    for row, subset in itertools.product(table, range(2**NUM_TARGETS)):
        count = subset.bit_count()
        size = [1, 3, 3, 1][count]
        pair = sum(
            (NUM_TARGETS + 1) / part.bit_count() * row[part] for part in (subset, 2**NUM_TARGETS - 1 - subset) if part
        )
        second += float((pair / 2).square().sum()) / (NUM_TARGETS + 1) / size
    assert float(benchmark.complementary_pair(draws, "exact_count")[0]) == pytest.approx(2 * second, rel=1e-12)


def test_bernoulli_moments_against_quadrature():
    coefficients = benchmark.second_moments(benchmark.LLADA, 2)
    t = torch.linspace(benchmark.EPSILON, 1, 2_000_001, dtype=torch.float64)
    one, two = torch.trapezoid(2 * (1 - t) / t, t), torch.trapezoid(torch.ones_like(t), t)
    expected = torch.stack([one, two]) / (1 - benchmark.EPSILON)
    assert torch.allclose(coefficients, expected, rtol=1e-3)


def test_fitted_counts_are_the_best_proposal(draws):
    """`(sum_l sqrt(v_l))^2`, by Cauchy-Schwarz; each row of the table counts alike."""
    counts = torch.arange(1, NUM_TARGETS + 1)
    values = draws.norms[0].sum(dim=1) / counts**2
    fitted = benchmark.fitted_proposal(draws, draws.norms, None)
    assert float(fitted[0]) == pytest.approx(float(values.sqrt().sum() ** 2), rel=1e-12)


@pytest.mark.parametrize(("num_targets", "num_bins"), [(1, 4), (18, 18), (96, 12)])
def test_bins_cover_every_count_once(num_targets, num_bins):
    bins = benchmark.count_bins(num_targets, num_bins)
    assert [count for low, high in bins for count in range(low, high + 1)] == list(range(1, num_targets + 1))
    assert len(bins) <= num_bins


def test_the_script_prints_its_table(monkeypatch, capsys):
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(benchmark, "load_rows", lambda task, num_rows: pad_rows([ids[0], ids[1][:8]], [3, 2]))
    flags = ["--task", "lines", "--rows", "2", "--bins", "3", "--replicates", "2", "--direct", "3"]
    monkeypatch.setattr(sys, "argv", ["gradient_variance.py", *flags])
    assert benchmark.main() == 0
    printed = capsys.readouterr().out
    assert "lines, 0 steps: 2 rows of 6 targets" in printed
    for name in (*benchmark.ESTIMATORS, "complementary pairs, exact count", "counts fitted to gradients, each count"):
        assert f"| {name} | " in printed


def test_gradients_of_rows_are_those_of_the_model():
    """The per-row function against backward through the model's own scoring, with padding."""
    model = load_task_model("lines", 0)
    rows = pad_rows([[5, 9, 11, 30, 7], [8, 4, 21]], [1, 0])
    masked = rows.target_mask & torch.tensor([[0, 1, 0, 1, 1], [1, 0, 1, 0, 0]]).bool()
    gradients, nll = benchmark.row_gradients(model)(rows, masked)
    model.set_attn_implementation("sdpa")
    scores = model(
        input_ids=rows.input_ids.masked_fill(masked, model.config.mask_token_id),
        attention_mask=rows.attention_mask,
        target_ids=rows.input_ids,
        target_mask=masked,
    )
    assert torch.allclose(nll[masked], scores.token_nll, atol=1e-5)
    scores.token_nll.sum().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert torch.allclose(gradients.sum(dim=0), expected, atol=1e-4 * float(expected.abs().max()))
