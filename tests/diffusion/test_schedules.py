import math

import mpmath
import pytest
import torch

from dlm_tune.diffusion import NOISE_SCHEDULES, geometric, polynomial

# every entry, and other parameters of the families
SCHEDULES = {
    **NOISE_SCHEDULES,
    "square": polynomial(2.0),
    "square_root": polynomial(0.5),
    "cubic": polynomial(3.0),
    "geometric_sedd": geometric(1e-3, 1.0),
}
with mpmath.workdps(60):
    HALF_PI = mpmath.pi / 2

# alpha(t) and its inverse, as the papers write them, in the arithmetic of 50 digits
DEFINITIONS = {
    "linear": (lambda t: 1 - t, lambda a: 1 - a),
    "log_linear": (lambda t: mpmath.exp(mpmath.log(1 - t)) if t < 1 else mpmath.mpf(0), lambda a: 1 - a),
    "cosine": (lambda t: 1 - mpmath.cos(HALF_PI * (1 - t)), lambda a: 1 - mpmath.acos(1 - a) / HALF_PI),
    "cosine_mdlm": (lambda t: mpmath.cos(HALF_PI * t), lambda a: mpmath.acos(a) / HALF_PI),
    "cosine_squared_mdlm": (
        lambda t: mpmath.cos(HALF_PI * t) ** 2,
        lambda a: mpmath.acos(mpmath.sqrt(a)) / HALF_PI,
    ),
    "geometric": (
        lambda t: mpmath.exp(-(mpmath.mpf(1e-5) ** (1 - t)) * mpmath.mpf(20) ** t),
        lambda a: mpmath.log(-mpmath.log(a) / mpmath.mpf(1e-5)) / mpmath.log(20 / mpmath.mpf(1e-5)),
    ),
    "polynomial": (lambda t: 1 - t ** mpmath.mpf(1.25), lambda a: (1 - a) ** mpmath.mpf(0.8)),
    "square": (lambda t: 1 - t**2, lambda a: mpmath.sqrt(1 - a)),
    "square_root": (lambda t: 1 - mpmath.sqrt(t), lambda a: (1 - a) ** 2),
    "cubic": (lambda t: 1 - t**3, lambda a: mpmath.cbrt(1 - a)),
    "geometric_sedd": (
        lambda t: mpmath.exp(-(mpmath.mpf(1e-3) ** (1 - t))),
        lambda a: mpmath.log(-mpmath.log(a) / mpmath.mpf(1e-3)) / mpmath.log(1 / mpmath.mpf(1e-3)),
    ),
}
NEAR_BOTH_ENDS = [2.0**-53, 1e-12, 1e-6, 1e-3, 0.1, 0.3, 0.5, 0.7, 0.9, 1 - 1e-3, 1 - 1e-6, 1 - 2.0**-40, 1 - 2.0**-53]
EVERY_SCHEDULE = pytest.mark.parametrize("name", SCHEDULES)


@pytest.fixture(autouse=True)
def fifty_digits():
    with mpmath.workdps(50):
        yield


def mean_mask_probability(name: str) -> float:
    """E_t[1 - alpha(t)] in closed form."""
    if name.startswith("geometric"):
        low, high = (1e-5, 20) if name == "geometric" else (1e-3, 1)
        return 1 - float((mpmath.e1(low) - mpmath.e1(high)) / mpmath.log(mpmath.mpf(high) / low))
    return {
        "cosine": 2 / math.pi,
        "cosine_mdlm": 1 - 2 / math.pi,
        "polynomial": 4 / 9,
        "square": 1 / 3,
        "square_root": 2 / 3,
        "cubic": 1 / 4,
    }.get(name, 0.5)


@EVERY_SCHEDULE
def test_weight_is_the_log_derivative_of_the_mask_probability(name):
    """-alpha' / (1 - alpha) = d log(1 - alpha) / dt: autograd is the oracle."""
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((1 - SCHEDULES[name].alpha(t)).log().sum(), t)
    # autograd's error is that of 1 - alpha, absolute where alpha is near 1: hence atol for weights near 0
    torch.testing.assert_close(SCHEDULES[name].weight(t), expected, rtol=1e-9, atol=1e-12)


@EVERY_SCHEDULE
def test_alpha_and_weight_keep_their_accuracy_near_both_ends(name):
    """Relative error below 1e-13 against 50 digits, the derivative taken numerically: no cancellation anywhere."""
    alpha, _ = DEFINITIONS[name]
    t = torch.tensor(NEAR_BOTH_ENDS, dtype=torch.float64)
    found = SCHEDULES[name].alpha(t).tolist(), SCHEDULES[name].weight(t).tolist()
    for time, found_alpha, found_weight in zip(NEAR_BOTH_ENDS, *found, strict=True):
        exact = alpha(mpmath.mpf(time))
        slope = mpmath.diff(alpha, mpmath.mpf(time), h=mpmath.mpf(10) ** -30)
        assert found_alpha == pytest.approx(float(exact), rel=1e-13), time
        assert found_weight == pytest.approx(float(-slope / (1 - exact)), rel=1e-13), time


@EVERY_SCHEDULE
def test_inverse_keeps_its_accuracy_near_both_ends(name):
    schedule, (_, inverse) = SCHEDULES[name], DEFINITIONS[name]
    low, high = (float(schedule.alpha(torch.tensor(end, dtype=torch.float64))) for end in (1.0, 0.0))
    alpha_t = [value for value in NEAR_BOTH_ENDS if low < value < high]
    assert len(alpha_t) >= 4
    found = schedule.inverse_alpha(torch.tensor(alpha_t, dtype=torch.float64)).tolist()
    # geometric: t is the logarithm of a ratio near 1, and not near 0 in any natural unit
    absolute = 1e-15 if name.startswith("geometric") else 0
    for value, time in zip(alpha_t, found, strict=True):
        assert time == pytest.approx(float(inverse(mpmath.mpf(value))), rel=1e-13, abs=absolute), value


@EVERY_SCHEDULE
def test_round_trip(name):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    schedule = SCHEDULES[name]
    torch.testing.assert_close(schedule.inverse_alpha(schedule.alpha(t)), t, rtol=0, atol=1e-11)


@EVERY_SCHEDULE
def test_decreases_between_its_ends(name):
    alpha = SCHEDULES[name].alpha(torch.linspace(0, 1, 101, dtype=torch.float64))
    low, high = {"geometric": (-20, -1e-5), "geometric_sedd": (-1, -1e-3)}.get(name, (-math.inf, 0))
    assert alpha[0].item() == pytest.approx(math.exp(high), rel=1e-15)
    assert alpha[-1].item() == pytest.approx(math.exp(low), rel=1e-14, abs=0)
    assert (alpha.diff() < 0).all()


@EVERY_SCHEDULE
def test_mean_weighted_mask_probability_is_what_is_covered(name):
    """E_t[w(t) p(t)] = alpha(0) - alpha(1), by the midpoint rule (slow where a power of t is not smooth at 0)."""
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    ends = SCHEDULES[name].alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    mean = (SCHEDULES[name].weight(t) * (1 - SCHEDULES[name].alpha(t))).mean()
    tolerance = {"square_root": 1e-3, "polynomial": 1e-7}.get(name, 1e-8)
    torch.testing.assert_close(mean, ends[0] - ends[1], rtol=tolerance, atol=0)


@EVERY_SCHEDULE
def test_mean_fraction_of_masked_tokens(name):
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    mean = (1 - SCHEDULES[name].alpha(t)).mean().item()
    assert mean == pytest.approx(mean_mask_probability(name), rel=1e-6)


def test_cosines_are_different_functions():
    """The three that the literature calls "cosine": their mean masked fractions are 0.637, 0.363 and 0.5."""
    fractions = [mean_mask_probability(name) for name in ("cosine", "cosine_mdlm", "cosine_squared_mdlm")]
    assert [round(fraction, 3) for fraction in fractions] == [0.637, 0.363, 0.5]


def test_log_linear_is_linear():
    assert NOISE_SCHEDULES["log_linear"] is NOISE_SCHEDULES["linear"]


def test_polynomial_of_power_one_is_linear():
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    for one, other in zip(polynomial(1.0), NOISE_SCHEDULES["linear"], strict=True):
        torch.testing.assert_close(one(t), other(t), rtol=1e-14, atol=1e-15)


def test_inverse_of_geometric_stays_in_the_unit_interval():
    inverse = geometric(1e-3, 1.0).inverse_alpha(torch.tensor([0.0, 0.1, 0.9999, 1.0], dtype=torch.float64))
    assert inverse.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("power", [0.0, -1.0, math.inf, math.nan])
def test_powers_that_do_not_decrease_are_refused(power):
    with pytest.raises(ValueError, match=f"power={power} must be a positive number"):
        polynomial(power)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1e-3, math.inf), (math.nan, 1.0)])
def test_sigmas_that_do_not_increase_are_refused(ends):
    with pytest.raises(ValueError, match=r"sigma_min=.* and sigma_max=.* must satisfy 0 < sigma_min < sigma_max"):
        geometric(*ends)
