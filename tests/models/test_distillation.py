"""The divergence from a guided teacher, against probabilities multiplied out over the whole vocabulary."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dlm_tune.diffusion.guidance import mask_prompt
from dlm_tune.models.distillation import GuidedTargets, score_against_teacher, without_adapters
from tests.models.test_lm_head import CountingHead
from tests.tiny_models import MASK_ID, tiny_dream, tiny_llada

VOCAB, WIDTH, MASK = 11, 5, 4
W = 1.5


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def guided_by_products(cond: Tensor, uncond: Tensor, scale: float, mask_token_id: int) -> Tensor:
    """p_cond^(1+w) / p_uncond^w of the ordinary tokens, normalised by their sum."""
    products = cond.softmax(-1) ** (1 + scale) / uncond.softmax(-1) ** scale
    products = products * (torch.arange(products.shape[-1]) != mask_token_id)
    return products / products.sum(-1, keepdim=True)


def divergence_by_sums(guided: Tensor, student: Tensor) -> Tensor:
    """KL(guided || softmax(student)), token by token, of those that the guided teacher gives."""
    probabilities = student.softmax(-1)
    terms = [
        torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.log()), 0.0)
        for p, q in zip(guided.T, probabilities.T, strict=True)
    ]
    return torch.stack(terms).sum(0)


def make_heads(count: int, kind: type[nn.Linear] = nn.Linear) -> tuple[Any, Any, list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    heads = [kind(WIDTH, VOCAB, bias=True, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    states = [torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3)]
    targets = torch.randint(0, VOCAB, (count,), generator=generator)
    weights = torch.rand(count, generator=generator) * 3
    return *heads, states, targets, weights


@given(
    count=st.integers(0, 9),
    rows=st.integers(1, 10),
    scale=st.sampled_from([-1.0, 0.5, 3.0]),
    softcap=st.sampled_from([None, 2.0]),
)
@settings(deadline=None, max_examples=60)
def test_loss_and_gradients_equal_enumeration(count: int, rows: int, scale: float, softcap: float | None) -> None:
    head, teacher_head, (hidden, cond, uncond), targets, weights = make_heads(count)
    inputs = [hidden.requires_grad_(), *head.parameters()]
    loss, nll, is_top1 = score_against_teacher(
        head,
        hidden,
        targets,
        weights,
        GuidedTargets(cond, uncond, scale, teacher_head),
        mask_token_id=MASK,
        vocab_size=VOCAB,
        logit_softcap=softcap,
        max_chunk_logits=rows * VOCAB,
    )
    with torch.no_grad():
        branches = [softcapped(teacher_head(states), softcap) for states in (cond, uncond)]
        guided = guided_by_products(*branches, scale, MASK)
    student = softcapped(head(hidden), softcap)
    expected = (divergence_by_sums(guided, student) * weights).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(is_top1, student.argmax(-1) == targets)
    torch.testing.assert_close(nll, -student.log_softmax(-1)[torch.arange(count), targets].detach())
    assert not nll.requires_grad
    gradients = torch.autograd.grad(loss * -2.5, inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected * -2.5, inputs), rtol=1e-9, atol=1e-9)
    assert all(parameter.grad is None for parameter in teacher_head.parameters())


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("make_model", [tiny_llada, tiny_dream])
def test_models_are_scored_at_the_states_that_predict(
    make_model: Any, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows through the models' own forward, against their raw logits, shifted as Dream's code does."""
    monkeypatch.setattr("dlm_tune.models.lm_head.MAX_CHUNK_LOGITS", 300)
    student, teacher = make_model(seed=1).double(), make_model(seed=2).double()
    for model in (student, teacher):
        model.config.final_logit_softcapping = softcap
    tokens = torch.randint(5, 120, (2, 8), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, 6:] = 0
    prompt, targets = torch.zeros(2, 8).bool(), torch.zeros(2, 8).bool()
    prompt[:, :3] = True
    targets[0, [3, 5, 7]], targets[1, [4, 5]] = True, True
    weights = torch.rand(2, 8)
    noisy = tokens.masked_fill(targets, MASK_ID)
    hidden_prompt = mask_prompt(noisy, prompt, MASK_ID, [int(tokens[0, 0])])
    assert (hidden_prompt != noisy).sum() == 5, "one token of the six is kept"

    def raw(model: Any, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=attention_mask).logits
        if model.config.logits_shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return softcapped(logits[targets], softcap)

    with torch.no_grad():
        cond, uncond = (
            teacher(
                input_ids=ids, attention_mask=attention_mask, position_mask=targets, wants_hidden=True
            ).last_hidden_state
            for ids in (noisy, hidden_prompt)
        )
        guided = guided_by_products(raw(teacher, noisy), raw(teacher, hidden_prompt), W, MASK_ID)
    assert cond.shape == (5, 32)
    scores = student(
        input_ids=noisy,
        attention_mask=attention_mask,
        target_ids=tokens,
        target_mask=targets,
        target_weights=weights,
        guided_targets=GuidedTargets(cond, uncond, W, teacher.lm_head),
    )
    expected = (divergence_by_sums(guided, raw(student, noisy)) * weights[targets]).sum()
    torch.testing.assert_close(scores.loss, expected)
    plain = student(input_ids=noisy, attention_mask=attention_mask, target_ids=tokens, target_mask=targets)
    torch.testing.assert_close(scores.token_nll, plain.token_nll.detach())
    assert torch.equal(scores.is_top1, plain.is_top1)
    parameters = list(student.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(scores.loss, parameters), torch.autograd.grad(expected, parameters), rtol=1e-6, atol=1e-9
    )


def test_a_tied_head_collects_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlm_tune.models.lm_head.MAX_CHUNK_LOGITS", 300)
    student = tiny_llada(seed=1, weight_tying=True).double()
    teacher = copy.deepcopy(student)
    table = student.model.embed_tokens.weight
    assert student.lm_head.weight is table
    tokens = torch.randint(5, 120, (2, 8))
    noisy, targets = tokens.clone(), torch.zeros(2, 8).bool()
    targets[:, 4:] = True
    noisy[targets] = MASK_ID
    states = [torch.randn(8, 32, dtype=torch.float64) for _ in range(2)]
    loss = student(
        input_ids=noisy,
        target_ids=tokens,
        target_mask=targets,
        target_weights=torch.ones(2, 8),
        guided_targets=GuidedTargets(*states, W, teacher.lm_head),
    ).loss
    guided = guided_by_products(*(teacher.lm_head(state).detach() for state in states), W, MASK_ID)
    expected = divergence_by_sums(guided, student(input_ids=noisy).logits[targets]).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, table), torch.autograd.grad(expected, table))


def test_a_student_that_gives_the_guided_distribution_stays() -> None:
    """Equal branches and the teacher's own weights: zero, but for the probability that the student gives the mask."""
    head, _, (hidden, *_), targets, weights = make_heads(6)
    guided = GuidedTargets(hidden.clone(), hidden.clone(), W, copy.deepcopy(head))
    settings = {"mask_token_id": MASK, "vocab_size": VOCAB}
    loss, _, _ = score_against_teacher(head, hidden, targets, weights, guided, **settings)
    of_mask = head(hidden).softmax(-1)[:, MASK]
    torch.testing.assert_close(loss, (-(1 - of_mask).log() * weights).sum())
    assert loss > 0.1
    with torch.no_grad():
        head.bias[MASK] = -1000.0
    loss, _, _ = score_against_teacher(head, hidden, targets, weights, guided, **settings)
    assert loss.abs() < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in torch.autograd.grad(loss, list(head.parameters())))


def test_the_probability_of_the_mask_token_is_trained_away() -> None:
    head, teacher_head, (hidden, cond, uncond), targets, _ = make_heads(6)
    settings = {"mask_token_id": MASK, "vocab_size": VOCAB}
    guided = GuidedTargets(cond, uncond, W, teacher_head)
    loss, _, _ = score_against_teacher(head, hidden, targets, torch.ones(6), guided, **settings)
    gradient = torch.autograd.grad(loss, head.bias)[0]
    torch.testing.assert_close(gradient[MASK], head(hidden).softmax(-1)[:, MASK].sum().detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_as_linear_does_and_compares_in_float32(dtype: torch.dtype) -> None:
    heads_and_states = make_heads(9)
    head, teacher_head = (head.float() for head in heads_and_states[:2])
    hidden, cond, uncond = (states.float() for states in heads_and_states[2])
    targets, weights = heads_and_states[3:]
    with torch.autocast("cpu", dtype):
        loss, nll, _ = score_against_teacher(
            head,
            hidden,
            targets,
            weights,
            GuidedTargets(cond, uncond, W, teacher_head),
            mask_token_id=MASK,
            vocab_size=VOCAB,
            max_chunk_logits=2 * VOCAB,
        )
        student, cond_logits, uncond_logits = head(hidden), teacher_head(cond), teacher_head(uncond)
    assert {student.dtype, loss.dtype, nll.dtype} == {dtype, torch.float32}
    guided = guided_by_products(cond_logits.double(), uncond_logits.double(), W, MASK)
    expected = (divergence_by_sums(guided, student.double()) * weights).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    exact = torch.autograd.grad(expected, head.weight)[0]
    assert (head.weight.grad - exact).norm() < 0.02 * exact.norm()


def test_logits_of_one_chunk_exist_at_a_time() -> None:
    head, teacher_head, (hidden, cond, uncond), targets, weights = make_heads(9, CountingHead)
    hidden.requires_grad_()
    saved: list[int] = []
    settings = {"mask_token_id": MASK, "vocab_size": VOCAB, "max_chunk_logits": 4 * VOCAB}
    guided = GuidedTargets(cond, uncond, W, teacher_head)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss, _, _ = score_against_teacher(head, hidden, targets, weights, guided, **settings)
    assert (head.calls, teacher_head.calls) == (3, 6)
    assert max(head.largest, teacher_head.largest) == 4
    assert max(saved) <= max(hidden.numel(), head.weight.numel()) < 9 * VOCAB
    loss.backward()
    assert (head.calls, teacher_head.calls) == (6, 12)


LORAS = {
    "lora_on_head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "attention_only": {},
}


@pytest.mark.parametrize("lora", list(LORAS))
def test_the_teachers_head_is_the_one_below_the_adapter(lora: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backward pass too, which calls it again."""
    monkeypatch.setattr("dlm_tune.models.lm_head.MAX_CHUNK_LOGITS", 300)
    base = tiny_llada().double()
    untouched = copy.deepcopy(base.lm_head)
    configuration = {"target_modules": ["q_proj"], "init_lora_weights": False} | LORAS[lora]
    model = get_peft_model(base, LoraConfig(r=2, **configuration))
    head = model.base_model.model.lm_head
    if lora == "modules_to_save":
        with torch.no_grad():
            head.modules_to_save["default"].weight.mul_(2)
    assert torch.equal(without_adapters(head).weight, untouched.weight)
    tokens = torch.randint(5, 100, (2, 9))
    targets, weights = tokens > 40, torch.rand(2, 9)
    states = [torch.randn(int(targets.sum()), 32, dtype=torch.float64) for _ in range(2)]
    loss = model(
        input_ids=tokens,
        target_ids=tokens,
        target_mask=targets,
        target_weights=weights,
        guided_targets=GuidedTargets(*states, W),
    ).loss
    guided = guided_by_products(*(untouched(state).detach() for state in states), W, MASK_ID)
    expected = (divergence_by_sums(guided, model(input_ids=tokens).logits[targets]) * weights[targets]).sum()
    torch.testing.assert_close(loss, expected)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained))


def test_inconsistent_modes_are_refused() -> None:
    model, tokens = tiny_llada(), torch.randint(5, 100, (1, 4))
    guided = GuidedTargets(torch.zeros(4, 32), torch.zeros(4, 32), W)
    with pytest.raises(ValueError, match="give target_weights too"):
        model(input_ids=tokens, target_ids=tokens, target_mask=tokens > 0, guided_targets=guided)
    with pytest.raises(ValueError, match="wants_hidden asks for the hidden states at position_mask"):
        model(input_ids=tokens, wants_hidden=True)
