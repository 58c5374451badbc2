import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlm_tune.diffusion import NORMALIZATIONS, count_items, loss_weights


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    cut=st.integers(1, 8),
    normalization=st.sampled_from(NORMALIZATIONS),
    seed=st.integers(0, 100),
)
def test_sum_over_microbatches_is_the_loss_of_the_whole_batch(lengths, cut, normalization, seed):
    """Any cut into microbatches, ragged ones too, gives the closed form of the whole batch."""
    target_mask = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)
    row_loss = torch.rand(len(lengths), generator=generator, dtype=torch.float64) * (torch.tensor(lengths) > 0)
    microbatches = list(zip(target_mask.split(cut), row_loss.split(cut), strict=True))
    num_items = sum(count_items(mask, normalization) for mask, _ in microbatches)
    loss = sum(
        (loss_weights(torch.ones(len(m)).double(), m, normalization, num_items) * r).sum() for m, r in microbatches
    )

    if normalization == "tokens":
        expected = row_loss.sum() / max(sum(lengths), 1)
    else:
        scored = [(value / length) for value, length in zip(row_loss, lengths, strict=True) if length]
        expected = sum(scored) / max(len(scored), 1)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_token_weights_and_row_weights_are_normalised_alike(normalization):
    """(R, L) weights that are constant in a row give what (R,) weights give, also where R = L."""
    target_mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    row_weights = torch.tensor([2.0, 3.0, 0.0], dtype=torch.float64)
    num_items = count_items(target_mask, normalization)
    by_row = loss_weights(row_weights, target_mask, normalization, num_items)
    by_token = loss_weights(row_weights[:, None].expand(3, 3), target_mask, normalization, num_items)
    assert by_row.shape == (3,)
    assert torch.equal(by_token, by_row[:, None].expand(3, 3))
    expected = {"tokens": [2 / 4, 3 / 4, 0], "sequences": [2 / 3 / 2, 3 / 2, 0]}[normalization]
    assert by_row.tolist() == pytest.approx(expected)


def test_tokens_counts_targets_and_not_masked_positions():
    target_mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert count_items(target_mask, "tokens") == 4
    assert count_items(target_mask, "sequences") == 2


def test_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="loss_normalization='batch' is unknown: choose 'tokens' or 'sequences'"):
        count_items(torch.ones(1, 1, dtype=torch.bool), "batch")
