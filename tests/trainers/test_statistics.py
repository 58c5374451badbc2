import math

import pytest
import torch

from dlm_tune.diffusion import NoisyBatch
from dlm_tune.trainers.statistics import nelbo_standard_error, row_statistics, summarise


def test_sums_of_a_batch_worked_out_by_hand():
    """Two rows: one of 4 targets with 1 masked (bucket 25-50 %), one of 2 with both masked (75-100 %)."""
    target_mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    masked = torch.tensor([[False, True, False, False], [True, True, False, False]])
    noisy = NoisyBatch(
        noisy_input_ids=torch.zeros(2, 4).long(),
        masked=masked,
        weights=torch.tensor([4.0, 1.0], dtype=torch.float64),
        timesteps=torch.tensor([0.1, 0.9], dtype=torch.float64),
    )
    statistics = row_statistics(torch.tensor([0.5, 1.0, 3.0]), torch.tensor([True, False, True]), noisy, target_mask)
    metrics = summarise(statistics.sum(0))
    assert metrics["nelbo"] == pytest.approx((4 * 0.5 + 1 * 4.0) / 6)
    assert metrics["masked_accuracy"] == pytest.approx(2 / 3)
    assert metrics["mean_timestep"] == pytest.approx(0.5)
    assert metrics["fraction_masked"] == pytest.approx(3 / 6)
    assert metrics["nll_masked_25_50"] == pytest.approx(0.5)
    assert metrics["nll_masked_75_100"] == pytest.approx(2.0)
    assert metrics["accuracy_masked_75_100"] == pytest.approx(0.5)
    assert "nll_masked_00_25" not in metrics


def test_no_masked_token_gives_zeros_and_no_nan():
    noisy = NoisyBatch(
        torch.zeros(1, 2).long(), torch.zeros(1, 2).bool(), torch.zeros(1).double(), torch.zeros(1).double()
    )
    metrics = summarise(row_statistics(torch.zeros(0), torch.zeros(0).bool(), noisy, torch.ones(1, 2).bool()).sum(0))
    assert all(math.isfinite(value) for value in metrics.values())


def test_standard_error_of_equal_lengths_is_the_textbook_one():
    statistics = torch.zeros(50, 18, dtype=torch.float64)
    statistics[:, 2] = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics[:, 3] = 5
    expected = statistics[:, 2].std() / 5 / math.sqrt(50)
    assert nelbo_standard_error(statistics) == pytest.approx(float(expected), rel=1e-12)


def test_standard_error_of_unequal_lengths_is_the_spread_over_data_sets():
    """Nats grow with length: the error of the ratio is far below that of the sum. 2000 data sets are the oracle."""
    generator = torch.Generator().manual_seed(0)
    statistics = torch.zeros(2000, 100, 18, dtype=torch.float64)
    targets = torch.randint(1, 40, (2000, 100), generator=generator).double()
    statistics[..., 3] = targets
    statistics[..., 2] = targets * (2 + 0.2 * torch.randn(2000, 100, generator=generator, dtype=torch.float64))
    spread = (statistics[..., 2].sum(1) / statistics[..., 3].sum(1)).std()
    errors = [nelbo_standard_error(rows) for rows in statistics[:100]]
    assert sum(errors) / len(errors) == pytest.approx(float(spread), rel=0.1)


def test_standard_error_of_one_row_is_unknown():
    assert math.isnan(nelbo_standard_error(torch.ones(1, 18, dtype=torch.float64)))
