"""The training loss of tiny transformers, averaged over all noise, is the enumerated NELBO, for every schedule."""

import itertools
import math

import pytest
import torch

from dlm_tune.diffusion import NOISE_SCHEDULES, TIMESTEP_SAMPLERS, corrupt, enumerate_nelbo
from tests.diffusion.exact import count_edges
from tests.tiny_models import MASK_ID, tiny_dream, tiny_llada

ROW = torch.tensor([11, 35, 12, 60, 13, 90])
TARGETS = torch.tensor([False, True, True, True, False, True])


def nats(model, noisy, weights):
    """The trainer's forward: the weighted sum over the masked tokens of all rows."""
    rows = len(noisy.noisy_input_ids)
    with torch.no_grad():
        outputs = model(
            input_ids=noisy.noisy_input_ids,
            attention_mask=torch.ones(rows, len(ROW), dtype=torch.long),
            target_ids=ROW.expand(rows, -1),
            target_mask=noisy.masked,
            target_weights=weights[:, None].expand(rows, len(ROW)),
        )
    assert outputs.loss.dtype == torch.float64
    return outputs.loss.item()


def exact_nelbo(model):
    def cross_entropy(noisy_input_ids, masked):
        with torch.no_grad():
            return model(input_ids=noisy_input_ids, target_ids=ROW[None], target_mask=masked).token_nll

    return enumerate_nelbo(cross_entropy, ROW, TARGETS, MASK_ID)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_exact_count_averaged_over_all_noise_is_the_enumerated_nelbo(make_model, schedule):
    model = make_model().double()
    total = int(TARGETS.sum())
    edges = count_edges(NOISE_SCHEDULES[schedule], total)
    orders = torch.tensor(list(itertools.permutations(range(total))), dtype=torch.float64) / total
    expected = 0.0
    for count in range(total):
        uniforms = torch.zeros(len(orders), len(ROW), dtype=torch.float64)
        uniforms[:, TARGETS] = orders  # every order of the targets' uniforms is equally probable
        noisy = corrupt(
            ROW.expand(len(orders), -1),
            TARGETS.expand(len(orders), -1),
            ((edges[count] + edges[count + 1]) / 2).expand(len(orders)),
            uniforms,
            schedule=NOISE_SCHEDULES[schedule],
            masking="exact_count",
            mask_token_id=MASK_ID,
        )
        assert (noisy.masked.sum(1) == count + 1).all()
        probability = float(edges[count + 1] - edges[count])
        expected += probability * nats(model, noisy, noisy.weights) / math.factorial(total)
    assert expected == pytest.approx(exact_nelbo(model), rel=1e-9)


@pytest.mark.parametrize("sampler", TIMESTEP_SAMPLERS)
@pytest.mark.parametrize("masking", ["exact_count", "bernoulli"])
@pytest.mark.parametrize("schedule", ["linear", "cosine_mdlm", "polynomial"])
def test_sampled_losses_lie_within_four_standard_errors(sampler, masking, schedule):
    """Independent steps of 16 rows: the mean over steps against the enumeration."""
    model, steps, rows = tiny_llada().double(), 40, 16
    means = []
    for step in range(steps):
        uniforms = torch.rand(rows, len(ROW), dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        noisy = corrupt(
            ROW.expand(rows, -1),
            TARGETS.expand(rows, -1),
            TIMESTEP_SAMPLERS[sampler](0, step, torch.arange(rows), rows),
            uniforms,
            schedule=NOISE_SCHEDULES[schedule],
            masking=masking,
            mask_token_id=MASK_ID,
            noise_epsilon=1e-5,
        )
        means.append(nats(model, noisy, noisy.weights) / rows)
    means = torch.tensor(means, dtype=torch.float64)
    assert (means.mean() - exact_nelbo(model)).abs() < 4 * means.std() / math.sqrt(steps)
