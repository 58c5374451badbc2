"""One optimiser step cut in any way: the same noise for every row, and weights that add up to the same loss."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlm_tune.data import DiffusionCollator
from dlm_tune.diffusion import NOISE_SCHEDULES
from dlm_tune.trainers import DiffusionConfig
from dlm_tune.trainers.step_noise import corrupt_step, noise_schedule

PAD, EOS, MASK = 0, 1, 2


def config(**arguments):
    return DiffusionConfig(
        output_dir="unused", bf16=False, use_cpu=True, report_to="none", **({"max_length": 64} | arguments)
    )


def make_row(index, num_prompt, num_answer):
    ids = [3 + (7 * index + position) % 50 for position in range(num_prompt + num_answer)]
    labels = [-100] * num_prompt + ids[num_prompt:]
    return {"input_ids": ids, "labels": labels, "row_index": index}


def cross_entropy(row_index, position):
    """Stands for the model: any function of the token's place."""
    return 0.1 + ((row_index * 37 + position * 11) % 23) / 7


def run_step(ranks, args):
    """Corrupt the microbatches of each simulated process; `ranks[r][m]` is a list of rows or of packed rows.

    Returns:
        The loss of the step, and of each row its masked positions, timestep and loss.
    """
    collate = DiffusionCollator(pad_token_id=PAD, eos_token_id=EOS)
    counted = []

    def keep(local):
        counted.append(local)
        return local

    for microbatches in ranks:  # what every process contributes to the collective
        corrupt_step([collate(rows) for rows in microbatches], args, step=3, epoch=1, mask_token_id=MASK, gather=keep)
    counts = torch.cat(counted)
    loss, seen = 0.0, {}
    for rank, microbatches in enumerate(ranks):
        batches = [collate(rows) for rows in microbatches]
        corrupt_step(batches, args, step=3, epoch=1, mask_token_id=MASK, rank=rank, gather=lambda _: counts)
        for batch in batches:
            for row, index in enumerate(batch["row_index"].tolist()):
                masked = batch["noisy"].masked[row].nonzero()[:, 0].tolist()
                weights = batch["loss_weights"][row].double()
                row_loss = sum(float(weights[position]) * cross_entropy(index, position) for position in masked)
                assert float(weights.sum()) == pytest.approx(sum(float(weights[position]) for position in masked))
                seen[index] = (masked, float(batch["noisy"].timesteps[row]), row_loss)
                loss += row_loss
    return loss, seen


def cut(rows, sizes):
    """The rows in groups of the given sizes, repeated as needed."""
    groups, start, turn = [], 0, 0
    while start < len(rows):
        size = sizes[turn % len(sizes)]
        groups.append(rows[start : start + size])
        start, turn = start + size, turn + 1
    return groups


@settings(max_examples=60, deadline=None)
@example([(1, 2)] * 8, set(), [2], 2, False, "tokens", "exact_count", "nelbo")  # two processes of two microbatches
@given(
    shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=14),
    dropped=st.sets(st.integers(0, 13)),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    world_size=st.integers(1, 4),
    packed=st.booleans(),
    normalization=st.sampled_from(["tokens", "sequences"]),
    masking=st.sampled_from(["exact_count", "bernoulli"]),
    weighting=st.sampled_from(["nelbo", "uniform", "cart"]),
)
def test_any_cut_of_a_global_batch_has_the_same_noise_and_loss(
    shapes, dropped, sizes, world_size, packed, normalization, masking, weighting
):
    """Ragged microbatches and ranks, rows dropped by a filter, packed or not."""
    rows = [make_row(index, *shape) for index, shape in enumerate(shapes) if index not in dropped]
    if not rows:
        return
    args = config(loss_normalization=normalization, masking=masking, loss_weighting=weighting)
    whole, expected = run_step([[rows]], args)
    groups = cut(rows, sizes)
    if packed:
        groups = [[{"rows": part} for part in cut(group, [2, 1])] for group in groups]
    # microbatch m of rank r is group m * world_size + r; all ranks have the same number of microbatches
    usable = len(groups) - len(groups) % world_size if len(groups) >= world_size else 0
    if not usable:
        world_size, usable = 1, len(groups)
    ranks = [[groups[i] for i in range(rank, usable, world_size)] for rank in range(world_size)]
    if usable < len(groups):  # the same rows again, as one batch
        kept = [row for group in groups[:usable] for item in group for row in item.get("rows", [item])]
        whole, expected = run_step([[kept]], args)
    loss, seen = run_step(ranks, args)
    assert seen.keys() == expected.keys()
    for index, (masked, timestep, row_loss) in expected.items():
        assert seen[index][0] == masked
        assert seen[index][1] == timestep
        assert seen[index][2] == pytest.approx(row_loss, rel=1e-6)
    assert loss == pytest.approx(whole, rel=1e-6)


def test_a_ragged_step_still_has_one_row_in_each_stratum():
    rows = [make_row(index, 1, 4) for index in range(5)]
    _, seen = run_step([[rows[:3]], [rows[3:]]], config(timestep_sampling="stratified"))
    assert sorted(int(timestep * 5) for _, timestep, _ in seen.values()) == [0, 1, 2, 3, 4]


def step_of(rows, first_target_position=0, **arguments):
    batch = DiffusionCollator(pad_token_id=PAD, eos_token_id=EOS)(rows)
    num_tokens = corrupt_step(
        [batch], config(**arguments), step=0, epoch=0, mask_token_id=MASK, first_target_position=first_target_position
    )
    return batch, int(num_tokens)


def test_plain_rows_are_shortened_and_answers_are_not():
    rows = [make_row(0, 0, 30), make_row(1, 5, 30), make_row(2, 1, 30)]  # the third as with shifted logits
    batch, num_tokens = step_of(rows, first_target_position=1, random_length_probability=1.0)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[1] == 36
    assert lengths[0] < 31
    assert lengths[2] < 32
    assert num_tokens == sum(lengths)
    assert not (batch["target_mask"] & ~batch["attention_mask"].bool()).any()
    assert not batch["noisy"].masked[0, lengths[0] :].any()
    # tokens: the denominator counts what is left
    noisy, left = batch["noisy"], int(batch["target_mask"].sum())
    row_weight = float(noisy.weights[1]) / left
    assert float(batch["loss_weights"][1].max()) == pytest.approx(row_weight, rel=1e-6)


def test_a_prompt_of_one_token_is_a_prompt_where_logits_are_not_shifted():
    batch, _ = step_of([make_row(2, 1, 30)], random_length_probability=1.0)
    assert batch["attention_mask"].sum() == 32


def test_without_the_key_no_row_is_shortened():
    batch, num_tokens = step_of([make_row(0, 0, 30)])
    assert num_tokens == 31 == int(batch["attention_mask"].sum())


def test_shortening_is_as_frequent_as_asked_and_changes_with_the_epoch():
    rows = [make_row(index, 0, 20) for index in range(400)]
    batch, _ = step_of(rows, random_length_probability=0.25)
    # a cut row keeps its full length with probability 1 / 21
    share = float((batch["attention_mask"].sum(1) < 21).double().mean())
    assert abs(share - 0.25 * 20 / 21) < 4 * (0.24 * 0.76 / 400) ** 0.5


def test_loss_weights_are_those_of_the_weighting():
    rows = [make_row(0, 2, 6), make_row(1, 1, 3)]
    for weighting in ("nelbo", "uniform", "cart"):
        batch, _ = step_of(rows, loss_weighting=weighting)
        noisy, weights = batch["noisy"], batch["loss_weights"].double()
        total = int(batch["target_mask"].sum())
        assert not weights[~noisy.masked].any()
        if weighting == "nelbo":
            assert torch.allclose(weights[noisy.masked], (noisy.weights[noisy.masked_rows] / total), rtol=1e-6)
        elif weighting == "uniform":
            assert torch.allclose(weights[noisy.masked], torch.full((int(noisy.masked.sum()),), 1 / total).double())
        else:
            assert (weights[noisy.masked] < 1 / total).all()


def test_the_power_of_the_polynomial_schedule_is_used():
    t = torch.tensor([0.5], dtype=torch.float64)
    assert float(noise_schedule(config(noise_schedule="polynomial", noise_schedule_power=3.0)).alpha(t)) == 1 - 0.125
    assert noise_schedule(config(noise_schedule="polynomial")) == NOISE_SCHEDULES["polynomial"]


# Each argument of the noise reaches it

TWELVE = [make_row(index, 2, 12) for index in range(6)]


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_the_schedule_decides_the_noise(schedule):
    batch, _ = step_of(TWELVE, noise_schedule=schedule, masking="bernoulli")
    noisy = batch["noisy"]
    torch.testing.assert_close(noisy.weights, NOISE_SCHEDULES[schedule].weight(noisy.timesteps))


def test_noise_epsilon_is_the_smallest_timestep():
    near, far = (step_of(TWELVE, masking="bernoulli", noise_epsilon=eps)[0]["noisy"].timesteps for eps in (1e-3, 0.5))
    torch.testing.assert_close(far, 0.5 + 0.5 * (near - 1e-3) / (1 - 1e-3))


def test_the_parameter_of_cart_is_used():
    weights = [step_of(TWELVE, loss_weighting="cart", cart_geometric_p=p)[0]["loss_weights"] for p in (0.3, 0.9)]
    default = step_of(TWELVE, loss_weighting="cart")[0]["loss_weights"]
    assert torch.equal(weights[0], default)
    assert not torch.allclose(weights[1], default)


def test_left_padding_moves_no_mask():
    masks = []
    for side in ("right", "left"):
        rows = [make_row(index, 2, 3 + index) for index in range(6)]
        batch = DiffusionCollator(pad_token_id=PAD, eos_token_id=EOS, padding_side=side)(rows)
        corrupt_step([batch], config(), step=0, epoch=0, mask_token_id=MASK)
        masks.append(batch["noisy"].masked[batch["attention_mask"].bool()])
    assert torch.equal(*masks)
