"""The sampler against enumeration: its exact output law on a table model, counts, seeds, masks and early stops."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from dlm_tune.generation import DiffusionGenerationConfig, generate
from dlm_tune.generation.confidence import CONFIDENCE_FUNCTIONS
from dlm_tune.generation.config import REMASKING_RULES
from dlm_tune.generation.sampler import draw_tokens, transfer_counts
from tests.generation.table_model import JointModel, chi_square, empirical, exact_law, total_variation

NUM_SAMPLES = 20_000
# 99.9 % points of chi-square.
CRITICAL = {26: 54.05, 63: 103.4}


@pytest.fixture(scope="module")
def joint_model():
    return JointModel()


def sample(model, num_rows=NUM_SAMPLES, length=3, **options):
    options = {"temperature": 1.0, "block_length": None, "stop_at_eos": False} | options
    empty = torch.zeros(num_rows, 0, dtype=torch.long)
    return generate(model, empty, max_new_tokens=length, **options)


UNBIASED = [(rule, "predictive") for rule in REMASKING_RULES]


@pytest.mark.parametrize(("remasking", "confidence_from"), [*UNBIASED, ("low_confidence", "sampled")])
@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1], [3]])
def test_samples_follow_the_enumerated_law(joint_model, remasking, confidence_from, counts):
    law = exact_law(joint_model, remasking, confidence_from, counts)
    assert sum(law.values()) == pytest.approx(1)
    output = sample(joint_model, steps=len(counts), remasking=remasking, confidence_from=confidence_from, seed=5)
    assert output.num_forward_passes == len(counts)
    assert chi_square(joint_model, output.sequences, {row: p for row, p in law.items() if p > 0}) < CRITICAL[26]


@pytest.mark.parametrize(("remasking", "confidence_from"), UNBIASED)
def test_one_token_a_step_is_exact_for_predictive_orders(joint_model, remasking, confidence_from):
    """The enumerated law, to which the samples above are compared, is the model's joint itself."""
    joint = dict(zip(joint_model.rows, joint_model.joint.tolist(), strict=True))
    assert total_variation(exact_law(joint_model, remasking, confidence_from, [1, 1, 1]), joint) < 1e-12


def test_ranking_by_the_sampled_token_is_not_a_sampler_of_the_joint(joint_model):
    joint = dict(zip(joint_model.rows, joint_model.joint.tolist(), strict=True))
    assert total_variation(exact_law(joint_model, "low_confidence", "sampled", [1, 1, 1]), joint) > 0.2
    output = sample(joint_model, steps=3, confidence_from="sampled")
    assert total_variation(empirical(output.sequences), joint) > 0.2


def test_all_at_once_is_the_product_of_marginals(joint_model):
    joint = dict(zip(joint_model.rows, joint_model.joint.tolist(), strict=True))
    marginals = joint_model.probabilities((3, 3, 3))
    product = {row: float(torch.tensor([marginals[i][v] for i, v in enumerate(row)]).prod()) for row in joint}
    predicted = total_variation(product, joint)
    measured = total_variation(empirical(sample(joint_model, steps=1).sequences), joint)
    assert predicted > 0.1
    assert measured == pytest.approx(predicted, abs=0.02)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_one_token_follows_softmax_of_logits_over_temperature(temperature):
    logits = torch.randn(65, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    model = constant_model(logits, mask_token_id=64)
    output = sample(model, num_rows=50_000, length=1, steps=1, temperature=temperature)
    expected = 50_000 * (logits[:64] / temperature).softmax(0)
    counts = torch.bincount(output.sequences[:, 0], minlength=64)
    frequent = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[frequent].sum()
    rest = (counts[~frequent].sum() - expected[~frequent].sum()) ** 2 / expected[~frequent].sum().clamp_min(1e-9)
    assert statistic + (rest if (~frequent).any() else 0) < CRITICAL[63]


def constant_model(logits, mask_token_id, **config):
    """A model with the same logits `(V,)`, or `(L, V)` by position, whatever its input."""

    def forward(input_ids, attention_mask, position_mask):
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, logits.shape[-1])[position_mask])

    forward.config = SimpleNamespace(
        mask_token_id=mask_token_id, **{"eos_token_id": None, "pad_token_id": None} | config
    )
    return forward


def test_drawing_inverts_the_cumulative_distribution():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.5, 0.9, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(probs, uniforms).tolist() == [1, 1, 3, 3, 3, 3]


def test_drawing_keeps_the_tail_of_a_large_vocabulary():
    """A token of probability 0.99 before a million of 1e-8: 1 % of the numbers must fall among those, evenly."""
    probs = torch.full((1, 1_000_001), 1e-8, dtype=torch.float64)
    probs[0, 0] = 0.99
    uniforms = torch.tensor([0.0, 0.5, 0.9899, 0.9901, 0.995, 1 - 2.0**-53], dtype=torch.float64)
    tokens = draw_tokens(probs.expand(6, -1), uniforms)
    assert tokens[:3].tolist() == [0, 0, 0]
    assert tokens[3:].tolist() == pytest.approx([10_000, 500_000, 1_000_000], abs=2)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(1, 30))
def test_transfer_counts_use_up_every_mask(num_masked, num_steps):
    counts = transfer_counts(torch.tensor(num_masked), num_steps)
    assert counts.shape == (len(num_masked), num_steps)
    assert counts.sum(1).tolist() == num_masked
    assert (counts.max(1).values - counts.min(1).values).max() <= 1
    assert (counts.diff(dim=1) <= 0).all(), "the remainder goes to the first steps"


@settings(max_examples=60, deadline=None)
@example(  # a token right of the EOS is committed before the EOS, and discarded when the row ends
    num_blocks=1,
    block_length=4,
    extra_steps=1,
    remasking="low_confidence",
    temperature=3.0,
    confidence_from="sampled",
    suppress_eos_confidence=False,
    seed=0,
)
@given(
    num_blocks=st.integers(1, 4),
    block_length=st.integers(1, 5),
    extra_steps=st.integers(0, 25),
    remasking=st.sampled_from(REMASKING_RULES),
    temperature=st.sampled_from([0.0, 0.5, 3.0]),
    confidence_from=st.sampled_from(["sampled", "predictive"]),
    suppress_eos_confidence=st.booleans(),
    seed=st.integers(-5, 5),
)
def test_any_options_fill_the_canvas_without_masks(num_blocks, block_length, extra_steps, seed, **options):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    logits[7] = 50  # the mask token, by far the most probable
    model = constant_model(logits, 7, eos_token_id=2, pad_token_id=1)
    config = DiffusionGenerationConfig(
        max_new_tokens=num_blocks * block_length,
        block_length=block_length,
        steps=num_blocks + extra_steps,
        suppress_tokens=[5],
        return_trace=True,
        seed=seed,
        **options,
    )
    snapshots = []
    prompts = torch.tensor([[1, 3], [4, 4], [0, 6]])
    output = generate(
        model, prompts, None, config, on_step=lambda *event: snapshots.append((*event[:2], event[2].clone()))
    )
    new = output.sequences[:, 2:]
    assert output.sequences[:, :2].equal(prompts)
    assert not torch.isin(new, torch.tensor([5, 7])).any()
    assert len(snapshots) == output.num_forward_passes <= config.steps
    assert snapshots[-1][2].equal(output.sequences)
    for step, block, canvas in snapshots:
        open_blocks = (canvas[:, 2:] == 7).view(3, num_blocks, block_length).any(2)
        assert not open_blocks[:, :block].any(), "blocks are filled left to right"
        kept = output.trace >= 0
        shown = torch.where(output.trace <= step, new, 7)
        assert shown[kept].equal(canvas[:, 2:][kept]), "the trace gives back the kept tokens of every step"


@pytest.mark.parametrize(("steps", "passes"), [(12, 12), (7, 7), (3, 3), (500, 12)])
def test_forward_passes_are_the_steps(steps, passes):
    model = constant_model(torch.zeros(5), 4)
    output = generate(model, torch.ones(2, 3, dtype=torch.long), max_new_tokens=12, block_length=4, steps=steps)
    assert output.num_forward_passes == passes


def eos_model(eos_positions, length, num_rows, peak=9.0):
    """Greedy proposal `10 + position`, or EOS (id 2) at the given positions of a row; earlier is more confident."""
    logits = torch.zeros(num_rows, length, 64)
    for row in range(num_rows):
        for position in range(length):
            token = 2 if position in eos_positions[row] else 10 + position
            logits[row, position, token] = peak - 0.1 * position

    def forward(input_ids, attention_mask, position_mask):
        rows = input_ids[:, 0]
        forward.rows_seen.append(rows.tolist())
        return SimpleNamespace(logits=logits[rows][:, :length][position_mask[:, 1:]])

    forward.rows_seen = []
    forward.config = SimpleNamespace(mask_token_id=63, eos_token_id=2, pad_token_id=0)
    return forward


def test_a_row_ends_at_its_first_eos_and_leaves_the_computation():
    model = eos_model([[2, 3], [], [0]], length=8, num_rows=3)
    prompts = torch.tensor([[0], [1], [2]])
    output = generate(model, prompts, max_new_tokens=8, steps=8, block_length=4, return_trace=True)
    assert output.sequences[:, 1:].tolist() == [
        [10, 11, 2, 0, 0, 0, 0, 0],
        [10, 11, 12, 13, 14, 15, 16, 17],
        [2, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert model.rows_seen == [[0, 1, 2], [0, 1], [0, 1], [1], [1], [1], [1], [1]]
    assert output.trace.tolist() == [[0, 1, 2, *[-1] * 5], list(range(8)), [0, *[-1] * 7]]


def test_the_loop_stops_when_all_rows_have_ended():
    model = eos_model([[1], [1]], length=8, num_rows=2)
    output = generate(model, torch.tensor([[0], [1]]), max_new_tokens=8, steps=8, block_length=4)
    assert output.num_forward_passes == 2


def test_eos_before_an_open_gap_does_not_end_the_row():
    """An EOS committed first, at the end of the block, waits for the positions before it."""
    logits = torch.zeros(1, 4, 16)
    for position, (token, peak) in enumerate([(5, 1.0), (6, 2.0), (7, 3.0), (2, 9.0)]):
        logits[0, position, token] = peak
    model = constant_model(logits, 15, eos_token_id=2, pad_token_id=0)
    output = generate(model, torch.zeros(1, 0, dtype=torch.long), max_new_tokens=4, steps=4, block_length=None)
    assert output.sequences.tolist() == [[5, 6, 7, 2]]
    assert output.num_forward_passes == 4


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_eos_with_suppressed_confidence_is_committed_last(temperature):
    """LLaDA's own option loses its effect on EOS at temperature > 0; ours must not."""
    options = {"max_new_tokens": 4, "steps": 4, "block_length": None, "return_trace": True, "temperature": temperature}
    model = eos_model([[0]], length=4, num_rows=1)
    prompt = torch.tensor([[0]])
    assert generate(model, prompt, stop_at_eos=False, **options).trace.tolist() == [[0, 1, 2, 3]]
    late = generate(model, prompt, stop_at_eos=False, suppress_eos_confidence=True, **options)
    assert late.trace.tolist() == [[3, 0, 1, 2]]
    assert late.sequences.tolist() == [[0, 2, 11, 12, 13]]
    assert 2 not in generate(model, prompt, suppress_eos=True, **options).sequences


def test_without_a_padding_token_the_rest_of_a_row_is_eos():
    model = eos_model([[1]], length=4, num_rows=1)
    for pad_token_id in (None, model.config.mask_token_id):
        model.config.pad_token_id = pad_token_id
        output = generate(model, torch.tensor([[0]]), max_new_tokens=4, steps=4, block_length=None)
        assert output.sequences.tolist() == [[0, 10, 2, 2, 2]]


def test_eos_ids_come_from_the_generation_config_too():
    model = eos_model([[]], length=4, num_rows=1)
    model.generation_config = SimpleNamespace(eos_token_id=[11])
    prompt = torch.tensor([[0]])
    options = {"max_new_tokens": 4, "steps": 4, "block_length": None}
    assert generate(model, prompt, **options).sequences.tolist() == [[0, 10, 11, 0, 0]]
    assert generate(model, prompt, eos_token_ids=[12], **options).sequences.tolist() == [[0, 10, 11, 12, 0]]
    assert generate(model, prompt, stop_at_eos=False, **options).sequences.tolist() == [[0, 10, 11, 12, 13]]


@pytest.mark.parametrize("remasking", REMASKING_RULES)
def test_samples_depend_on_seed_and_row_key_only(remasking):
    model = JointModel(length=3, sharpness=0.5)
    options = {"steps": 2, "remasking": remasking, "seed": 3}
    together = sample(model, num_rows=40, **options).sequences
    assert together.equal(sample(model, num_rows=40, **options).sequences)
    assert not together.equal(sample(model, num_rows=40, **options | {"seed": 4}).sequences)
    assert len(together.unique(dim=0)) > 5, "rows of a batch have noise of their own"
    for rows in (torch.arange(7), torch.tensor([31, 2, 17])):
        assert sample(model, num_rows=len(rows), row_keys=rows, **options).sequences.equal(together[rows])


def test_global_generators_are_neither_read_nor_moved():
    model = JointModel()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample(model, num_rows=20, steps=2).sequences
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(1)
    assert sample(model, num_rows=20, steps=2).sequences.equal(first)


def test_rows_in_chunks_give_the_same_tokens(monkeypatch):
    model = JointModel()
    whole = sample(model, num_rows=50, steps=2).sequences
    monkeypatch.setattr("dlm_tune.generation.sampler._MAX_CHUNK_ELEMENTS", 9)
    assert sample(model, num_rows=50, steps=2).sequences.equal(whole)


class Denoiser(nn.Module):
    """A module with a part kept in evaluation mode on purpose."""

    def __init__(self):
        super().__init__()
        self.frozen, self.dropout = nn.Dropout(), nn.Dropout()
        self.frozen.eval()
        self.config = SimpleNamespace(mask_token_id=3)
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, input_ids, attention_mask, position_mask):
        assert not self.dropout.training
        assert not torch.is_grad_enabled()
        if self.config.mask_token_id < 0:
            raise RuntimeError("broken")
        return SimpleNamespace(logits=self.weight.expand(int(position_mask.sum()), 4))


def test_training_modes_are_restored_also_after_an_error():
    model = Denoiser()
    prompt = torch.zeros(1, 1, dtype=torch.long)
    output = generate(model, prompt, max_new_tokens=2, block_length=None)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    embedding = nn.Embedding(4, 2)
    embedding(output.sequences).sum().backward()  # sequences may enter a computation with gradients
    model.config.mask_token_id = -1
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, prompt, max_new_tokens=2, block_length=None)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


def test_confidence_functions_are_the_documented_rules():
    assert set(CONFIDENCE_FUNCTIONS) == set(REMASKING_RULES)
    log_probs = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64).log()
    arguments = (log_probs, torch.tensor([1]), torch.tensor([0.3], dtype=torch.float64))
    values = {name: function(*arguments).item() for name, function in CONFIDENCE_FUNCTIONS.items()}
    assert values == pytest.approx(
        {"low_confidence": -1.3862943611, "margin": 0.25, "entropy": -1.0397207708, "random": 0.3}
    )
