"""Guidance in the sampler: its law against enumeration, its branches against hand-built ones, and what it costs."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from dlm_tune.generation import DiffusionGenerationConfig, generate, pad_prompts
from dlm_tune.generation.canvas import make_canvas
from dlm_tune.generation.confidence import CONFIDENCE_FUNCTIONS
from dlm_tune.generation.guidance import make_guidance, predict_step
from tests.generation.table_model import GuidedTable, JointModel, chi_square, exact_law
from tests.tiny_models import BOS_ID, EOS_ID, MASK_ID, tiny_dream, tiny_llada

PROMPTS = [[9, 20, 33, 41, 50], [12, 13], [77, 60, 61, 62, 63, 64, 65], [101]]
NEGATIVE_PROMPTS = [[5], [30, 31, 32, 33, 34, 35, 36, 37, 38], [12, 14], [80, 81]]
OPTIONS = {"max_new_tokens": 12, "block_length": 6, "steps": 8, "stop_at_eos": False}
NUM_SAMPLES = 20_000
CRITICAL = {2: 13.82, 26: 54.05}  # 99.9 % points of chi-square
CANVAS = 3


@pytest.fixture(scope="module")
def joint_model():
    """Its first token is the prompt: masking it leaves the exact marginal of the canvas."""
    return JointModel(length=1 + CANVAS)


def sample(model, prompt=0, num_rows=NUM_SAMPLES, length=CANVAS, **options):
    options = {"temperature": 1.0, "block_length": None, "stop_at_eos": False, "max_new_tokens": length} | options
    return generate(model, torch.full((num_rows, 1), prompt), **options)


class Recorder:
    """A model that keeps what it is called with."""

    def __init__(self, model, prompt_length=1):
        self.model, self.config, self.prompt_length = model, model.config, prompt_length
        self.calls = []

    def __call__(self, input_ids, attention_mask, position_mask):
        self.calls.append((input_ids.clone(), attention_mask, position_mask.clone()))
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_mask=position_mask)

    def second_branch_rows(self):
        """How many rows of each call have a masked prompt."""
        return [
            int((ids[:, : self.prompt_length] == self.config.mask_token_id).all(1).sum()) for ids, *_ in self.calls
        ]


# The law


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
def test_a_single_token_has_the_enumerated_probabilities(monkeypatch, scale):
    model, seen = JointModel(length=2), []
    table = GuidedTable(model, 1, scale)

    def record(log_probs, ranked_tokens, uniforms):
        seen.append(log_probs)
        return uniforms

    monkeypatch.setitem(CONFIDENCE_FUNCTIONS, "random", record)
    output = sample(model, 1, length=1, steps=1, remasking="random", guidance_scale=scale)
    probabilities = seen[0].exp()
    assert (probabilities[:, model.mask_token_id] == 0).all()
    expected = torch.tensor(table.probabilities((model.mask_token_id,)), dtype=torch.float64)
    assert (probabilities[:, :-1] - expected).abs().max() < 1e-12
    law = {(1, v): float(p) for v, p in enumerate(expected[0])}
    assert chi_square(model, output.sequences, law) < CRITICAL[2]


@pytest.mark.parametrize("remasking", ["random", "low_confidence", "margin"])
@pytest.mark.parametrize(("scale", "counts"), [(1.0, [1, 1, 1]), (-0.5, [2, 1]), (2.0, [3])])
def test_samples_follow_the_enumerated_law(joint_model, remasking, scale, counts):
    law = exact_law(GuidedTable(joint_model, 2, scale), remasking, "predictive", counts)
    assert sum(law.values()) == pytest.approx(1)
    options = {"remasking": remasking, "confidence_from": "predictive", "steps": len(counts), "seed": 5}
    output = sample(joint_model, 2, guidance_scale=scale, **options)
    statistic = chi_square(joint_model, output.sequences[:, 1:], law)
    assert statistic < CRITICAL[26]
    unguided = sample(joint_model, 2, **options)
    assert chi_square(joint_model, unguided.sequences[:, 1:], law) > 2 * CRITICAL[26], "the test tells them apart"


def test_samples_of_a_negative_prompt_follow_the_enumerated_law(joint_model):
    law = exact_law(GuidedTable(joint_model, 2, 1.0, other_prompt=0), "random", "predictive", [1, 1, 1])
    negative = torch.zeros(NUM_SAMPLES, 1, dtype=torch.long)
    output = sample(joint_model, 2, guidance_scale=1.0, negative_input_ids=negative, steps=3, remasking="random")
    assert chi_square(joint_model, output.sequences[:, 1:], law) < CRITICAL[26]


def test_minus_one_gives_the_samples_of_the_unconditional_model(joint_model):
    def unconditional(input_ids, attention_mask, position_mask):
        input_ids = torch.cat([torch.full_like(input_ids[:, :1], joint_model.mask_token_id), input_ids[:, 1:]], 1)
        return joint_model(input_ids, attention_mask, position_mask)

    unconditional.config = joint_model.config
    options = {"num_rows": 500, "steps": 3}
    expected = sample(unconditional, 1, **options).sequences
    assert sample(joint_model, 1, guidance_scale=-1, **options).sequences.equal(expected)
    assert not sample(joint_model, 1, **options).sequences.equal(expected)


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("excluded_by", ["both", "cond"])
def test_tokens_that_a_branch_excludes_are_never_drawn(joint_model, value, excluded_by):
    """Also beside suppressed tokens; the law is guidance on the tokens that are left."""

    def model(input_ids, attention_mask, position_mask):
        logits = joint_model(input_ids, attention_mask, position_mask).logits.clone()
        is_cond = (input_ids[:, :1] != joint_model.mask_token_id).expand_as(position_mask)[position_mask]
        logits[is_cond | (excluded_by == "both"), 1] = value
        return SimpleNamespace(logits=logits)

    model.config = joint_model.config
    plain = sample(joint_model, guidance_scale=1.5, steps=2, num_rows=1000, suppress_tokens=[1])
    output = sample(model, guidance_scale=1.5, steps=2, num_rows=1000)
    assert output.sequences.equal(plain.sequences)
    assert set(output.sequences[:, 1:].flatten().tolist()) == {0, 2}


def test_a_constant_in_a_branch_changes_no_token(joint_model):
    def shifted(input_ids, attention_mask, position_mask):
        logits = joint_model(input_ids, attention_mask, position_mask).logits
        shift = torch.where(input_ids[:, :1] == joint_model.mask_token_id, -30.0, 7.0)
        return SimpleNamespace(logits=logits + shift.expand_as(position_mask)[position_mask][:, None])

    shifted.config = joint_model.config
    options = {"guidance_scale": 2.0, "steps": 2, "num_rows": 500}
    assert sample(shifted, **options).sequences.equal(sample(joint_model, **options).sequences)


# What it costs


@pytest.mark.parametrize("given", [{}, {"guidance_scale": 0.0}, {"guidance_scales": torch.zeros(4)}])
def test_without_guidance_nothing_changes(given):
    """The same calls with the same inputs, and so the same tokens to the bit."""
    model = tiny_llada(seed=3)
    inputs = pad_prompts(PROMPTS, EOS_ID)
    recorder = Recorder(model)
    output = generate(recorder, *inputs, **OPTIONS, temperature=1.0, **given)
    plain = Recorder(model)
    expected = generate(plain, *inputs, **OPTIONS, temperature=1.0)
    assert output.sequences.equal(expected.sequences)
    assert (output.num_forward_passes, output.num_row_passes) == (len(recorder.calls), 32) == (8, 32)
    for call, expected_call in zip(recorder.calls, plain.calls, strict=True):
        assert all(one.equal(other) for one, other in zip(call, expected_call, strict=True))


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
@pytest.mark.parametrize("negative", [False, True])
def test_one_batched_pass_is_the_two_passes(make_model, negative):
    model = make_model(seed=3)
    inputs = pad_prompts(PROMPTS, EOS_ID)
    given = {}
    if negative:
        given["negative_input_ids"], given["negative_attention_mask"] = pad_prompts(NEGATIVE_PROMPTS, EOS_ID)
    logits = []
    for is_batched in (True, False):
        config = DiffusionGenerationConfig(**OPTIONS, guidance_scale=1.5, guidance_batching=is_batched)
        canvas = make_canvas(*inputs, 12, model.config)
        guidance = make_guidance(model.config, config, canvas, None, *given.values())
        rows, columns = torch.tensor([0, 1, 3]), slice(canvas.prompt_length, canvas.prompt_length + 6)
        with torch.no_grad():
            step, num_calls, num_rows = predict_step(model, canvas, rows, columns, guidance)
        assert (num_calls, num_rows, step.shape) == (1 if is_batched else 2, 6, (18, 128))
        logits.append(step[:])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    model = model.double()
    options = OPTIONS | given | {"guidance_scale": 1.5}
    batched = generate(model, *inputs, **options)
    two_passes = generate(model, *inputs, guidance_batching=False, **options)
    assert batched.sequences.equal(two_passes.sequences)
    assert not batched.sequences.equal(generate(model, *inputs, **OPTIONS).sequences)
    assert (batched.num_forward_passes, batched.num_row_passes) == (8, 64)
    assert (two_passes.num_forward_passes, two_passes.num_row_passes) == (16, 64)


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_each_row_may_have_its_own_scale(make_model):
    model = make_model(seed=3).double()
    input_ids, attention_mask = pad_prompts(PROMPTS, EOS_ID)
    scales = torch.tensor([0.0, 1.5, -1.0, 3.0])
    together = generate(model, input_ids, attention_mask, **OPTIONS, guidance_scales=scales, temperature=1.0)
    for row, scale in enumerate(scales.tolist()):
        alone = generate(
            model,
            torch.tensor([PROMPTS[row]]),
            **OPTIONS,
            guidance_scale=scale,
            temperature=1.0,
            row_keys=torch.tensor([row]),
        )
        assert together.sequences[row, -12:].equal(alone.sequences[0, -12:])
    replaced = generate(
        model, input_ids, attention_mask, **OPTIONS, guidance_scale=9, guidance_scales=scales, temperature=1.0
    )
    assert replaced.sequences.equal(together.sequences)


def test_rows_without_guidance_have_no_second_branch(joint_model):
    recorder = Recorder(joint_model)
    scales = torch.tensor([0, 1.0, 0, 0, -2.0])
    output = sample(recorder, num_rows=5, guidance_scales=scales, steps=3)
    assert recorder.second_branch_rows() == [2, 2, 2]
    assert (output.num_forward_passes, output.num_row_passes) == (3, 21)


@pytest.mark.parametrize("negative", [False, True])
def test_rows_that_have_ended_leave_both_branches(negative):
    """The others keep their scales and their negative prompts."""
    model = tiny_llada(seed=3).double()
    input_ids, attention_mask = pad_prompts(PROMPTS * 4, EOS_ID)
    options = OPTIONS | {"temperature": 1.5, "eos_token_ids": list(range(10, 30))}
    options["guidance_scales"] = torch.arange(16) / 8.0
    if negative:
        names = ("negative_input_ids", "negative_attention_mask")
        options |= dict(zip(names, pad_prompts(NEGATIVE_PROMPTS * 4, EOS_ID), strict=True))
    full = generate(model, input_ids, attention_mask, **options)
    stopped = generate(model, input_ids, attention_mask, **options | {"stop_at_eos": True})
    is_end = (full.sequences[:, -12:] >= 10) & (full.sequences[:, -12:] < 30)
    before = is_end.cumsum(1) - is_end.long() == 0
    assert stopped.sequences[:, -12:][before].equal(full.sequences[:, -12:][before])
    assert full.num_row_passes == 8 * (16 + 15)
    assert stopped.num_row_passes < 0.9 * full.num_row_passes
    assert before[:, -1].any()


# The schedule


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2.0] * 4),
        ({"guidance_schedule": "linear"}, [0.0, 0.5, 1.0, 1.5]),
        ({"guidance_schedule": "interval", "guidance_interval": [0.25, 0.75]}, [0.0, 2.0, 2.0, 0.0]),
        ({"guidance_schedule": "interval", "guidance_interval": [0.1, 0.5]}, [0.0, 2.0, 0.0, 0.0]),
        ({"guidance_schedule": "interval", "guidance_interval": [0, 1]}, [2.0] * 4),
    ],
)
def test_the_schedule_goes_by_the_committed_share(joint_model, options, expected):
    """By hand for a canvas of four tokens in two blocks; steps of scale 0 have no second branch."""
    model = JointModel(num_tokens=2, length=5)
    config = DiffusionGenerationConfig(max_new_tokens=4, block_length=2, steps=4, guidance_scale=2.0, **options)
    found, canvas = [], make_canvas(torch.tensor([[0], [1]]), None, 4, model.config)
    guidance = make_guidance(model.config, config, canvas)
    for num_committed in range(4):
        found.append(guidance.step_scales(canvas, torch.tensor([1, 0])).tolist())
        canvas.is_masked[:, 1 + num_committed] = False
    assert found == [[scale] * 2 for scale in expected]
    recorder = Recorder(model)
    output = generate(recorder, torch.tensor([[0], [1]]), None, config, temperature=1.0, stop_at_eos=False)
    assert recorder.second_branch_rows() == [2 if scale else 0 for scale in expected]
    assert output.num_row_passes == 8 + 2 * sum(scale != 0 for scale in expected)
    assert output.num_forward_passes == 4


def test_a_schedule_is_that_of_each_rows_own_scale():
    model = JointModel(num_tokens=2, length=5)
    config = DiffusionGenerationConfig(max_new_tokens=4, block_length=2, steps=4, guidance_schedule="linear")
    canvas = make_canvas(torch.tensor([[0], [1], [1]]), None, 4, model.config)
    guidance = make_guidance(model.config, config, canvas, torch.tensor([1.0, 0.0, 4.0]))
    canvas.is_masked[:, 1] = False
    canvas.is_masked[2, 2] = False
    assert guidance.step_scales(canvas, torch.arange(3)).tolist() == [0.25, 0.0, 2.0]


# The branches, by hand


def reference(model, prompt, other_prompt, scale, block_length, steps):
    """Greedy guided decoding of 12 tokens on dense logits of two unpadded rows, written from the formula."""
    new = torch.full((12,), MASK_ID)
    num_blocks = 12 // block_length
    for block, step in itertools.product(range(num_blocks), range(steps // num_blocks)):
        log_probs = []
        for ids in (prompt, other_prompt):
            logits = model(input_ids=torch.cat([torch.tensor(ids, dtype=torch.long), new])[None]).logits[0]
            if model.config.logits_shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            log_probs.append(logits[len(ids) :].log_softmax(-1))
        guided = (1 + scale) * log_probs[0] - scale * log_probs[1]
        guided[:, MASK_ID] = -torch.inf
        probability, token = guided.softmax(-1).max(-1)
        probability[new != MASK_ID] = -1
        probability[(block + 1) * block_length :] = -1
        num_open = int((new[: (block + 1) * block_length] == MASK_ID).sum())
        chosen = probability.topk(-(-num_open // (steps // num_blocks - step))).indices
        new[chosen] = token[chosen]
    return new


def masked(prompt, keep=()):
    return [token if token in keep else MASK_ID for token in prompt]


@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
@pytest.mark.parametrize(("scale", "block_length", "steps"), [(1.0, 12, 12), (2.0, 6, 6), (-0.5, 4, 12)])
@pytest.mark.parametrize("case", ["masked", "kept", "negative"])
@torch.no_grad()
def test_padded_batches_are_the_two_branches_by_hand(make_model, scale, block_length, steps, case):
    model = make_model(seed=3).double()
    given, others = {}, [masked(prompt) for prompt in PROMPTS]
    if case == "kept":
        model.config.guidance_keep_token_ids = [9, 13, 101, 63]
        others = [masked(prompt, [9, 13, 101, 63]) for prompt in PROMPTS]
    elif case == "negative":
        others = NEGATIVE_PROMPTS
        given["negative_input_ids"], given["negative_attention_mask"] = pad_prompts(NEGATIVE_PROMPTS, EOS_ID)
    options = OPTIONS | {"block_length": block_length, "steps": steps, "guidance_scale": scale} | given
    output = generate(model, *pad_prompts(PROMPTS, EOS_ID), **options)
    for row, (prompt, other) in enumerate(zip(PROMPTS, others, strict=True)):
        assert output.sequences[row, -12:].equal(reference(model, prompt, other, scale, block_length, steps))


@torch.no_grad()
def test_negative_prompts_may_be_shorter_or_empty():
    model = tiny_llada(seed=3).double()
    for negative in ([[]] * 4, [[7]] * 4, [[7, 8], [], [9], []]):
        input_ids, attention_mask = pad_prompts(negative, EOS_ID)
        given = {"negative_input_ids": input_ids, "negative_attention_mask": attention_mask, "guidance_scale": 1}
        output = generate(model, *pad_prompts(PROMPTS, EOS_ID), **OPTIONS | given | {"steps": 6})
        for row, (prompt, other) in enumerate(zip(PROMPTS, negative, strict=True)):
            assert output.sequences[row, -12:].equal(reference(model, prompt, other, 1, 6, 6))


def test_rows_with_nothing_to_hide_are_not_guided():
    model = tiny_llada(seed=3).double()
    model.config.guidance_keep_token_ids = [BOS_ID]
    inputs = pad_prompts([[], [BOS_ID], [BOS_ID, 40]], EOS_ID)
    recorder = Recorder(model)
    guided = generate(recorder, *inputs, **OPTIONS, guidance_scale=2.0)
    plain = generate(model, *inputs, **OPTIONS)
    assert guided.num_row_passes == 8 * 4
    assert guided.sequences[:2].equal(plain.sequences[:2])
    assert not guided.sequences[2].equal(plain.sequences[2])


def test_the_branches_are_combined_in_float32_in_chunks(monkeypatch):
    model = tiny_llada(seed=3).bfloat16()
    inputs = pad_prompts(PROMPTS, EOS_ID)
    options = OPTIONS | {"guidance_scales": torch.tensor([1.0, 0.0, 2.0, 1.0]), "temperature": 1.0}
    whole = generate(model, *inputs, **options).sequences
    config = DiffusionGenerationConfig(**OPTIONS)
    canvas = make_canvas(*inputs, 12, model.config)
    guidance = make_guidance(model.config, config, canvas, options["guidance_scales"])
    with torch.no_grad():
        logits = predict_step(model, canvas, torch.arange(4), slice(7, 13), guidance)[0]
    assert logits.cond.dtype == torch.bfloat16
    assert logits[:].dtype == torch.float32
    assert torch.cat([logits[n : n + 5] for n in range(0, 24, 5)]).equal(logits[:])
    monkeypatch.setattr("dlm_tune.generation.sampler._MAX_CHUNK_ELEMENTS", 5 * 128)
    assert generate(model, *inputs, **options).sequences.equal(whole)
