"""Variance of the training gradient per forward pass, of each way to draw masks, against LLaDA's recipe.

    python benchmarks/gradient_variance.py                       # windows of text, 96 targets: minutes on one core
    python benchmarks/gradient_variance.py --task inflection     # short, nearly deterministic answers
    python benchmarks/gradient_variance.py --direct 300          # and check by drawing whole batches

For fixed rows and a fixed model the gradient of one row is `w H(S)`, with `H(S)` the sum of the gradients of the
cross-entropies of the masked set `S`. Given `l = |S|` every estimator here draws `S` uniformly, so its second moment
per row is `sum_l e(l) E|H|^2` with `e(l) = E_t[P(l | t) w(t)^2]` known in closed form, and its mean is
`sum_l E[H] / l`, the gradient of the NELBO, the same for all. So `H` is drawn for counts spread over 1..A, and each
estimator's variance is a weighted sum of the same draws: LLaDA's heavy tail in `t` is integrated, not sampled. Coupled
timesteps add covariances between rows, complementary masks one between the two forward passes of a row. Inner products
are taken between random sketches of the gradients (CountSketch: unbiased), norms exactly. Standard errors are
jackknifed over replicates.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gradient_variance_tasks import (
    LLADA,
    TASKS,
    Estimator,
    Rows,
    batch_loss,
    load_rows,
    load_task_model,
    row_gradients,
)
from torch import Tensor

from dlm_tune.diffusion.schedules import COSINE, COSINE_MDLM, LINEAR, NoiseSchedule, polynomial

EPSILON = 1e-3
SKETCH = 8192
NUM_BUCKETS = 8  # of the masked fraction, for the fitted proposal
GRID = 2**15
ESTIMATORS: dict[str, Estimator] = {
    "LLaDA: bernoulli, uniform": LLADA,
    "bernoulli, antithetic": Estimator("bernoulli", "antithetic", LINEAR),
    "bernoulli, stratified": Estimator("bernoulli", "stratified", LINEAR),
    "bernoulli, systematic": Estimator("bernoulli", "systematic", LINEAR),
    "bernoulli, stratified, power 1.5": Estimator("bernoulli", "stratified", polynomial(1.5)),
    "exact count, uniform": Estimator("exact_count", "uniform", LINEAR),
    "exact count, antithetic": Estimator("exact_count", "antithetic", LINEAR),
    "exact count, stratified": Estimator("exact_count", "stratified", LINEAR),
    "exact count, systematic": Estimator("exact_count", "systematic", LINEAR),
    "exact count, stratified, cosine": Estimator("exact_count", "stratified", COSINE),
    "exact count, stratified, cosine_mdlm": Estimator("exact_count", "stratified", COSINE_MDLM),
    **{
        f"exact count, stratified, power {power:g}": Estimator("exact_count", "stratified", polynomial(power))
        for power in (0.65, 0.8, 1.25, 1.5, 2.0)
    },
}


class Draws(NamedTuple):
    """Gradients of rows at drawn counts: R replicates, K bins of counts, n rows.

    Attributes:
        counts: (R, K, n) long, masked tokens; uniform in its bin.
        widths: (K,) counts in each bin, so that `sum over bins of width * f(count)` estimates `sum over l of f(l)`.
        norms: (R, K, n) float64, `|H(S)|^2`.
        sketches: (R, K, n, SKETCH), for inner products.
        complements: (R, K, n) float64, inner product of `H(S)` with that of the complement of `S` in the targets.
        errors: (R, K, n) float64, mean over masked tokens of `(1 - p(target))^2`: what training sees at no cost.
        num_targets: A, the same for all rows.
    """

    counts: Tensor
    widths: Tensor
    norms: Tensor
    sketches: Tensor
    complements: Tensor
    errors: Tensor
    num_targets: int


def count_bins(num_targets: int, num_bins: int) -> list[tuple[int, int]]:
    """Cut 1..A into at most `num_bins` ranges (first, last), single counts at the low end."""
    edges = {round(edge) for edge in torch.logspace(0, math.log10(num_targets + 1), num_bins + 1).tolist()}
    return [(low, high - 1) for low, high in itertools.pairwise(sorted(edges))]


def draw(model: Any, rows: Rows, num_bins: int, replicates: int, complements: bool = True) -> Draws:
    """Draw masks of counts in every bin and their gradients; `complements` costs as many forward passes again."""
    num_rows, num_targets = len(rows.input_ids), int(rows.target_mask[0].sum())
    assert (rows.target_mask.sum(dim=1) == num_targets).all(), "rows differ in their number of targets"
    bins = count_bins(num_targets, num_bins)
    gradients = row_gradients(model)
    generator = torch.Generator().manual_seed(1)
    size = sum(parameter.numel() for parameter in model.parameters())
    places = torch.randint(SKETCH, (size,), generator=generator)
    signs = torch.randint(2, (size,), generator=generator).float() * 2 - 1
    shape = replicates, len(bins), num_rows
    counts = torch.zeros(shape, dtype=torch.long)
    norms, products, errors = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    sketches = torch.zeros(*shape, SKETCH)
    for replicate, (k, (low, high)) in itertools.product(range(replicates), enumerate(bins)):
        count = torch.randint(low, high + 1, (num_rows,), generator=generator)
        uniforms = torch.rand(rows.input_ids.shape, generator=generator).masked_fill(~rows.target_mask, 2.0)
        masked = uniforms <= uniforms.sort(dim=1).values.gather(1, count[:, None] - 1)
        gradient, nll = gradients(rows, masked)
        counts[replicate, k] = count
        norms[replicate, k] = gradient.double().square().sum(dim=1)
        sketches[replicate, k].index_add_(1, places, gradient * signs)
        errors[replicate, k] = (-torch.expm1(-nll)).square().sum(dim=1) / count
        if complements:
            other, _ = gradients(rows, rows.target_mask & ~masked)
            products[replicate, k] = (gradient * other).double().sum(dim=1)
    widths = torch.tensor([high - low + 1 for low, high in bins], dtype=torch.float64)
    return Draws(counts, widths, norms, sketches, products, errors, num_targets)


# Closed forms of an estimator: how it weighs the gradients of each count


def count_probabilities(schedule: NoiseSchedule, num_targets: int) -> Tensor:
    """Return q(l), l = 1..A, of `masking: exact_count`."""
    edges = schedule.inverse_alpha(1 - torch.arange(num_targets + 1, dtype=torch.float64) / num_targets)
    return edges.diff()


def binomials(probabilities: Tensor, num_targets: int) -> Tensor:
    """Return (T, A): probability of l = 1..A masked tokens of A at each mask probability (T,)."""
    counts = torch.arange(1, num_targets + 1, dtype=torch.float64)
    p = probabilities[:, None].clamp(max=1 - 1e-12)
    total = torch.tensor(num_targets + 1.0, dtype=torch.float64)
    choose = total.lgamma() - (counts + 1).lgamma() - (total - counts).lgamma()
    return (choose + counts * p.log() + (num_targets - counts) * (-p).log1p()).exp()


def weighted_counts(estimator: Estimator, num_targets: int, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return (T, A) `P(l | t) w` and `P(l | t) w^2` at uniform timesteps (T,)."""
    schedule = estimator.schedule
    if estimator.masking == "bernoulli":
        timesteps = EPSILON + (1 - EPSILON) * timesteps
        weight = schedule.weight(timesteps)[:, None]
        probability = binomials(1 - schedule.alpha(timesteps), num_targets)
        return probability * weight, probability * weight**2
    count = (((1 - schedule.alpha(timesteps)) * num_targets).floor().long() + 1).clamp(max=num_targets)
    one_hot = torch.nn.functional.one_hot(count - 1, num_targets).double()
    weights = 1 / (torch.arange(1, num_targets + 1) * count_probabilities(schedule, num_targets))
    return one_hot * weights, one_hot * weights**2


def second_moments(estimator: Estimator, num_targets: int) -> Tensor:
    """Return e(l), l = 1..A: the row's `E|g|^2` is `sum_l e(l) E|H_l|^2`."""
    if estimator.masking == "exact_count":
        counts = torch.arange(1, num_targets + 1)
        return 1 / (counts**2 * count_probabilities(estimator.schedule, num_targets))
    timesteps = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    return weighted_counts(estimator, num_targets, timesteps)[1].mean(dim=0)


def row_covariances(estimator: Estimator, num_targets: int, num_rows: int) -> Tensor | None:
    """Return (A, A): cov of two rows' gradients is `sum c(l, l') E[H_l] . E[H'_l']`; None for independent rows.

    The two rows take two different random places among `num_rows`, as in `dlm_tune.diffusion.timesteps`.
    """
    if estimator.timestep_sampling == "uniform":
        return None
    inside = 64
    timesteps = (torch.arange(num_rows * inside, dtype=torch.float64) + 0.5) / (num_rows * inside)
    first, _ = weighted_counts(estimator, num_targets, timesteps)
    mean = first.mean(dim=0)
    if estimator.timestep_sampling == "antithetic":
        return (first.T @ first.flip(0) / len(first) - mean[:, None] * mean) / (num_rows - 1)
    first = first.view(num_rows, inside, num_targets)  # (place, within, A)
    if estimator.timestep_sampling == "stratified":
        first = first.mean(dim=1, keepdim=True)
    batch = first.sum(dim=0)
    same_place = first.flatten(0, 1).T @ first.flatten(0, 1)
    pairs = (batch.T @ batch - same_place) / first.shape[1] / (num_rows * (num_rows - 1))
    return pairs - mean[:, None] * mean


# Variances from the draws


def each_replicate(draws: Draws, coefficients: Tensor, values: Tensor) -> Tensor:
    """Return (R,): `sum over rows and l of coefficients(l) values`, estimated by each replicate."""
    return (draws.widths[:, None] * coefficients[draws.counts - 1] * values).sum(dim=(1, 2))


def mean_gradients(draws: Draws) -> tuple[Tensor, Tensor]:
    """Return (R, R) `sum_i g_i . g'_i` and `sum_{i != j} g_i . g'_j` of replicates' estimates of the rows' means."""
    weights = (draws.widths[:, None] / draws.counts).to(draws.sketches.dtype)
    rows = torch.einsum("rkn,rkns->rns", weights, draws.sketches).double()
    batch = rows.sum(dim=1)
    same = torch.einsum("rns,qns->rq", rows, rows)
    return same, batch @ batch.T - same


def cross_row(draws: Draws, covariances: Tensor) -> Tensor:
    """Return (R,): sum over pairs of different rows of the covariance of their gradients."""
    results = []
    for counts, sketches in zip(draws.counts, draws.sketches, strict=True):
        flat = (sketches * draws.widths[:, None, None].to(sketches.dtype)).flatten(0, 1).double()
        row = torch.arange(counts.shape[1]).repeat(counts.shape[0])
        index = counts.flatten() - 1
        kernel = covariances[index[:, None], index] * (row[:, None] != row)
        results.append((kernel * (flat @ flat.T)).sum())
    return torch.stack(results)


def complementary_pair(draws: Draws, masking: str) -> Tensor:
    """Return (R,): `2 E|mean of the pair|^2`, that of `(S, t)` with its complement at `1 - t`, both unbiased.

    For exact count `l` is uniform on 0..A and an empty mask contributes zero; for bernoulli t is in [eps, 1 - eps].
    """
    num_targets = draws.num_targets
    counts = torch.arange(1, num_targets + 1, dtype=torch.float64)
    if masking == "exact_count":
        squares = (num_targets + 1) / counts**2
        products = (num_targets + 1) / (counts * (num_targets - counts))
    else:
        t = EPSILON + (1 - 2 * EPSILON) * (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
        probability = binomials(t, num_targets)
        squares = (probability / t[:, None] ** 2).mean(dim=0)
        products = (probability / (t * (1 - t))[:, None]).mean(dim=0)
    products[-1] = 0.0
    return each_replicate(draws, squares, draws.norms) + each_replicate(draws, products, draws.complements)


def fitted_proposal(draws: Draws, values: Tensor, num_buckets: int | None) -> Tensor:
    """Return (R,): second moment of counts drawn with `q(l)` fitted, for each replicate, on the others.

    `q` minimises `sum_l v(l) / q(l)` with `v = E|H_l|^2 / l^2`, constant in each of `num_buckets` equal ranges of the
    masked fraction (None: one for each bin of counts, the bound of what any proposal over counts can reach).
    """
    num_targets, results = draws.num_targets, []
    if num_buckets is None:
        firsts = torch.cat([torch.zeros(1), draws.widths.cumsum(0)]).long()
        bucket = torch.bucketize(torch.arange(num_targets), firsts, right=True) - 1
    else:
        bucket = (torch.arange(num_targets) * num_buckets) // num_targets
    sums = torch.zeros(len(draws.counts), int(bucket.max()) + 1, dtype=torch.float64)
    terms = draws.widths[:, None] * values / draws.counts**2
    sums.scatter_add_(1, bucket[draws.counts - 1].flatten(1), terms.flatten(1))
    for replicate in range(len(draws.counts)):
        others = sums.sum(dim=0) - sums[replicate]
        q = (others / bucket.bincount()).sqrt()[bucket]
        q = q / q.sum()
        results.append(each_replicate(draws, 1 / (torch.arange(1, num_targets + 1) ** 2 * q), draws.norms)[replicate])
    return torch.stack(results)


def token_errors(draws: Draws, num_buckets: int = 4) -> str:
    """Return the mean of `(1 - p(target))^2` over masked tokens, by range of the masked fraction."""
    weights = (draws.counts * draws.widths[:, None]).double().flatten()
    bucket = ((draws.counts * num_buckets - 1) // draws.num_targets).flatten()
    sums = torch.zeros(2, num_buckets, dtype=torch.float64)
    sums.index_add_(1, bucket, torch.stack([weights * draws.errors.flatten(), weights]))
    return " ".join(f"{error:.2f}" for error in (sums[0] / sums[1]).tolist())


def jackknife(statistic: Callable[[Tensor], float], replicates: int) -> tuple[float, float]:
    """Return `statistic(indices of replicates)` and its standard error."""
    every = torch.arange(replicates)
    left_out = torch.tensor([statistic(every[every != r]) for r in range(replicates)], dtype=torch.float64)
    return statistic(every), float(
        ((left_out - left_out.mean()).square().sum() * (replicates - 1) / replicates).sqrt()
    )


def variance_table(draws: Draws) -> dict[str, tuple[float, float, float]]:
    """Return for each estimator: ratio of noise variance to LLaDA's, its standard error, ratio of total variance.

    The noise is that of the masks, for fixed rows; the total adds that of drawing the rows, counted once a row.
    """
    replicates, _, num_rows = draws.counts.shape
    same, different = mean_gradients(draws)
    moments: dict[str, tuple[Tensor, int]] = {}
    for name, estimator in ESTIMATORS.items():
        moment = each_replicate(draws, second_moments(estimator, draws.num_targets), draws.norms)
        covariances = row_covariances(estimator, draws.num_targets, num_rows)
        moments[name] = (moment if covariances is None else moment + cross_row(draws, covariances)), 1
    if draws.complements.any():
        moments["complementary pairs, bernoulli"] = complementary_pair(draws, "bernoulli"), 2
        moments["complementary pairs, exact count"] = complementary_pair(draws, "exact_count"), 2
    energy = draws.errors * draws.counts  # of l independent tokens
    moments[f"counts fitted to token errors, {NUM_BUCKETS} buckets"] = fitted_proposal(draws, energy, NUM_BUCKETS), 1
    moments[f"counts fitted to gradients, {NUM_BUCKETS} buckets"] = fitted_proposal(draws, draws.norms, NUM_BUCKETS), 1
    moments["counts fitted to gradients, each count"] = fitted_proposal(draws, draws.norms, None), 1

    def off_diagonal(products: Tensor, index: Tensor) -> float:
        chosen = products[index][:, index]
        return float((chosen.sum() - chosen.trace()) / (len(index) * (len(index) - 1)))

    def variance(name: str, index: Tensor, total: bool) -> float:
        moment, forwards = moments[name]
        noise = float(moment[index].mean()) - forwards * off_diagonal(same, index)
        data = off_diagonal(same, index) - off_diagonal(different, index) / (num_rows - 1)
        return noise + forwards * data if total else noise

    baseline = next(iter(ESTIMATORS))

    def ratio(name: str, total: bool) -> Callable[[Tensor], float]:
        return lambda index: variance(name, index, total) / variance(baseline, index, total)

    return {
        name: (*jackknife(ratio(name, False), replicates), ratio(name, True)(torch.arange(replicates)))
        for name in moments
    }


# The same by drawing whole batches with the library's functions


def direct_check(model: Any, rows: Rows, draws: Draws, batches: int) -> None:
    """Print the variance of whole batches over the one from `draws`, and the mean gradient against LLaDA's.

    LLaDA's own ratio shows why its variance is integrated instead: a few batches make up most of it.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    generator = torch.Generator().manual_seed(2)
    places = torch.randint(SKETCH, (size,), generator=generator)
    signs = torch.randint(2, (size,), generator=generator).float() * 2 - 1
    same, _ = mean_gradients(draws)
    mean_square = float((same.sum() - same.trace()) / (len(same) * (len(same) - 1)))
    model.requires_grad_(True)
    reference: Tensor | None = None
    print(f"\nDirectly, {batches} batches each:\n")
    print(
        "| estimator | variance, batches / draws | share of the largest batch | mean gradient, z |\n|---|---|---|---|"
    )
    for name in ("LLaDA: bernoulli, uniform", "exact count, uniform", "exact count, stratified, power 1.5"):
        estimator = ESTIMATORS[name]
        sketches = torch.zeros(batches, SKETCH)
        for step in range(batches):
            model.zero_grad()
            batch_loss(model, rows, estimator, 3, step).backward()
            gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            sketches[step].index_add_(0, places, gradient * signs)
        values = sketches.double()
        reference = values if reference is None else reference
        deviations = (values - values.mean(0)).square().sum(1) * batches / (batches - 1)
        moment = each_replicate(draws, second_moments(estimator, draws.num_targets), draws.norms)
        predicted = float(moment.mean() - mean_square) / float(rows.target_mask.sum()) ** 2
        relative = math.hypot(
            float(deviations.std() / deviations.mean()) / math.sqrt(batches),
            float(moment.std() / moment.mean()) / math.sqrt(len(moment)),
        )
        ratio, largest = float(deviations.mean()) / predicted, float(deviations.max() / deviations.sum())
        # of the difference of means along LLaDA's mean gradient
        direction = reference.mean(0) / reference.mean(0).norm()
        ours, theirs = values @ direction, reference @ direction
        spread = math.sqrt(float(ours.var() + theirs.var()) / batches)
        z = f"{float(ours.mean() - theirs.mean()) / spread:+.1f}"
        print(f"| {name} | {ratio:.2f} ± {ratio * relative:.2f} | {largest:.2f} | {z} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="windows")
    parser.add_argument("--rows", type=int, default=16, help="rows of the batch (default 16)")
    parser.add_argument("--bins", type=int, default=18, help="ranges of counts (default 18)")
    parser.add_argument("--replicates", type=int, default=6)
    parser.add_argument("--train_steps", type=int, help="before the measurement; default by task")
    parser.add_argument("--direct", type=int, default=0, metavar="BATCHES", help="also draw whole batches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    steps = TASKS[arguments.task] if arguments.train_steps is None else arguments.train_steps
    model = load_task_model(arguments.task, steps)
    rows = load_rows(arguments.task, arguments.rows)
    draws = draw(model, rows, arguments.bins, arguments.replicates)
    print(f"{arguments.task}, {steps} steps: {arguments.rows} rows of {draws.num_targets} targets")
    print("\n| estimator | noise variance / LLaDA | total variance / LLaDA |\n|---|---|---|")
    for name, (ratio, error, total) in variance_table(draws).items():
        print(f"| {name} | {ratio:.3f} ± {error:.3f} | {total:.3f} |")
    print(f"\ntoken errors by quarter of the masked fraction: {token_errors(draws)}")
    if arguments.direct:
        direct_check(model, rows, draws, arguments.direct)
    print(f"\n{time.process_time() - start:.0f} CPU seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
