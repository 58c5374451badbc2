import pytest
import torch

from dlm_tune.diffusion import NOISE_SCHEDULES

EVERY_SCHEDULE = pytest.mark.parametrize("schedule", NOISE_SCHEDULES.values(), ids=NOISE_SCHEDULES.keys())


@EVERY_SCHEDULE
def test_weight_is_the_log_derivative_of_the_mask_probability(schedule):
    """-alpha' / (1 - alpha) = d log(1 - alpha) / dt: autograd is the oracle."""
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((1 - schedule.alpha(t)).log().sum(), t)
    torch.testing.assert_close(schedule.weight(t), expected, rtol=1e-9, atol=0)


@EVERY_SCHEDULE
def test_inverse(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(schedule.inverse_alpha(schedule.alpha(t)), t, rtol=0, atol=1e-12)


@EVERY_SCHEDULE
def test_decreases_from_clean_to_masked(schedule):
    alpha = schedule.alpha(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert alpha[0] == 1
    assert alpha[-1] == 0
    assert (alpha.diff() < 0).all()


@EVERY_SCHEDULE
def test_mean_weighted_mask_probability_is_one(schedule):
    """E_t[w(t) p(t)] = alpha(0) - alpha(1) = 1, by the midpoint rule."""
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    mean = (schedule.weight(t) * (1 - schedule.alpha(t))).mean()
    torch.testing.assert_close(mean, torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)
