"""The head in chunks equals the dense cross-entropy in values and gradients, whatever the head."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dlm_tune.models import fused_head
from dlm_tune.models.lm_head import plain_linear, score_targets
from tests.tiny_models import tiny_llada

VOCAB, WIDTH = 11, 5


class CountingHead(nn.Linear):
    """Not a plain Linear, so it is called; counts its calls and remembers the most rows it was given."""

    calls = 0
    largest = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        self.largest = max(self.largest, hidden.shape[0])
        return super().forward(hidden)


def make_inputs(
    count: int, kind: type[nn.Linear] = nn.Linear, *, bias: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Any, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    head = kind(WIDTH, VOCAB, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    hidden = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (count,), generator=generator)
    weights = torch.rand(count, generator=generator) * 3
    weights[::3] = 0
    return head, hidden, targets, weights


def dense(head: nn.Module, hidden: Tensor, targets: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def trainable(head: nn.Module, hidden: Tensor) -> list[Tensor]:
    return [hidden, *(parameter for parameter in head.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("kind", [nn.Linear, CountingHead])
@given(
    count=st.integers(0, 9),
    rows=st.integers(1, 10),
    bias=st.booleans(),
    frozen=st.sampled_from(["none", "weight", "all"]),
    softcap=st.sampled_from([None, 2.0]),
)
@settings(deadline=None, max_examples=60)
def test_loss_and_gradients_equal_dense(
    kind: type[nn.Linear], count: int, rows: int, bias: bool, frozen: str, softcap: float | None
) -> None:
    head, hidden, targets, weights = make_inputs(count, kind, bias=bias)
    head.weight.requires_grad_(frozen == "none")
    if bias:
        head.bias.requires_grad_(frozen != "all")
    inputs = trainable(head, hidden)
    limits = {"logit_softcap": softcap, "max_chunk_logits": rows * VOCAB}

    loss, nll, hits = score_targets(head, hidden, targets, VOCAB, token_weights=weights, **limits)
    expected_nll, expected_hits = dense(head, hidden, targets, softcap)
    expected = torch.autograd.grad((expected_nll * weights.double()).sum() * -2.5, inputs)
    assert not nll.requires_grad
    assert torch.equal(hits, expected_hits)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, (expected_nll * weights.double()).sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(loss * -2.5, inputs), expected, rtol=1e-10, atol=1e-10)

    no_loss, nll, hits = score_targets(head, hidden, targets, VOCAB, **limits)
    upstream = weights.double() * -2.5
    assert no_loss is None
    assert torch.equal(hits, expected_hits)
    torch.testing.assert_close(torch.autograd.grad(nll @ upstream, inputs), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [nn.Linear, CountingHead])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_dtypes_and_agrees_with_float64(kind: type[nn.Linear], dtype: torch.dtype) -> None:
    head, hidden, targets, weights = make_inputs(9, kind, bias=True, dtype=dtype)
    exact_head, exact_hidden = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    exact = (dense(exact_head, exact_hidden, targets)[0] * weights.double()).sum()
    expected = torch.autograd.grad(exact, trainable(exact_head, exact_hidden))
    loss, nll, _ = score_targets(head, hidden, targets, VOCAB, token_weights=weights, max_chunk_logits=2 * VOCAB)
    gradients = torch.autograd.grad(loss, trainable(head, hidden))
    assert {loss.dtype, nll.dtype} == {torch.float32}
    assert {gradient.dtype for gradient in gradients} == {dtype}
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=0)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient.double() - reference).norm() < tolerance * reference.norm()


@pytest.mark.parametrize("kind", [nn.Linear, CountingHead])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_as_linear_does_and_sums_in_float32(
    kind: type[nn.Linear], softcap: float | None, dtype: torch.dtype
) -> None:
    head, hidden, targets, weights = make_inputs(9, kind, bias=True, dtype=torch.float32)
    inputs = trainable(head, hidden)
    scale = 65536.0 if dtype == torch.float16 else 1.0  # as GradScaler does, with weights that need it
    weights = weights * 1e-6 if dtype == torch.float16 else weights
    with torch.autocast("cpu", dtype):
        loss, nll, hits = score_targets(
            head, hidden, targets, VOCAB, token_weights=weights, max_chunk_logits=2 * VOCAB, logit_softcap=softcap
        )
        expected_nll, expected_hits = dense(head, hidden, targets, softcap)
    assert {loss.dtype, nll.dtype} == {torch.float32}
    assert torch.equal(hits, expected_hits)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=0, atol=1e-6)
    gradients = torch.autograd.grad(loss * scale, inputs)
    expected = torch.autograd.grad((expected_nll * weights).sum() * scale, inputs)
    with torch.autocast("cpu", dtype):
        _, nll, _ = score_targets(head, hidden, targets, VOCAB, max_chunk_logits=2 * VOCAB, logit_softcap=softcap)
    torch.testing.assert_close(nll, expected_nll, rtol=0, atol=1e-6)
    gradients_of_nll = torch.autograd.grad((nll * weights).sum() * scale, inputs)
    for gradient, of_nll, reference in zip(gradients, gradients_of_nll, expected, strict=True):
        assert gradient.dtype == of_nll.dtype == torch.float32
        assert (gradient - reference).norm() < 0.01 * reference.norm()
        assert (of_nll - reference).norm() < 0.01 * reference.norm()


def test_float16_keeps_the_gradient_of_many_improbable_tokens() -> None:
    """Each of their probabilities is 16.2 of float16's smallest steps; together they are a tenth."""
    vocab = 100_000
    head = nn.Linear(2, vocab, bias=False)
    head.weight.requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([0.0, 1.0]).expand(vocab, 2))
        head.weight[-1] = torch.tensor([13.75, 0.0])
    hidden = torch.tensor([[1.0, 0.0]] * 3, requires_grad=True)
    targets, weights = torch.full((3,), vocab - 1), torch.tensor([1e-7, 1e-7, 2e-7])
    with torch.autocast("cpu", torch.float16):
        loss = score_targets(head, hidden, targets, vocab, token_weights=weights)[0]
    (gradient,) = torch.autograd.grad(loss, hidden)
    improbable = (vocab - 1) / (vocab - 1 + math.exp(13.75))
    torch.testing.assert_close(gradient[:, 1], weights * improbable, rtol=2e-3, atol=0)


def test_float16_holds_the_sum_over_many_rows_with_one_target() -> None:
    """2000 rows that all ask for one token: 1024 times its gradient is beyond float16, in the weight and the bias."""
    head, hidden, _, _ = make_inputs(2000, bias=True, dtype=torch.float32)
    targets, weights = torch.zeros(2000, dtype=torch.long), torch.full((2000,), 1 / 2000)
    inputs = trainable(head, hidden)
    with torch.autocast("cpu", torch.float16):
        loss = score_targets(head, hidden, targets, VOCAB, token_weights=weights)[0]
        expected = (dense(head, hidden, targets)[0] * weights).sum()
    gradients, references = (torch.autograd.grad(value, inputs) for value in (loss, expected))
    for gradient, reference in zip(gradients, references, strict=True):
        assert (gradient - reference).norm() < 0.01 * reference.norm()


def test_improbable_targets_have_finite_scores() -> None:
    head = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [500.0], [-500.0]]))
    hidden, targets = torch.ones(2, 1, requires_grad=True), torch.tensor([0, 2])
    loss, nll, _ = score_targets(head, hidden, targets, 3, token_weights=torch.ones(2))
    assert nll.tolist() == [500.0, 1000.0]
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], torch.tensor([[500.0], [1000.0]]))


def test_ties_go_to_the_smallest_token_as_argmax_says() -> None:
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    nn.init.zeros_(head.weight)
    targets = torch.tensor([0, 3])
    hits = score_targets(head, torch.randn(2, WIDTH), targets, VOCAB)[2]
    assert hits.tolist() == [True, False]


def test_second_backward_is_refused_and_token_scores_allow_it() -> None:
    head, hidden, targets, weights = make_inputs(4)
    loss, _, _ = score_targets(head, hidden, targets, VOCAB, token_weights=weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away by a first backward pass"):
        loss.backward()
    for is_trainable in (True, False):
        head.weight.requires_grad_(is_trainable)
        _, nll, _ = score_targets(head, hidden, targets, VOCAB, max_chunk_logits=2 * VOCAB)
        first = torch.autograd.grad(nll.sum(), trainable(head, hidden), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(nll.sum(), trainable(head, hidden)), first)


def test_gradients_accumulate_and_the_first_buffer_is_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets, weights = make_inputs(8)
    buffers: list[Tensor] = []
    make = fused_head._zeros_for_sum
    monkeypatch.setattr(fused_head, "_zeros_for_sum", lambda tensor: buffers.append(make(tensor)) or buffers[-1])
    for half in (slice(0, 4), slice(4, 8)):
        loss, _, _ = score_targets(head, hidden[half], targets[half], VOCAB, token_weights=weights[half])
        addresses = [buffer.data_ptr() for buffer in buffers]
        buffers.clear()  # as outside of this test, where nothing else holds the buffer
        loss.backward()
        if half.start == 0:
            assert head.weight.grad.data_ptr() == addresses[0], "no copy of a (V, D) buffer is made"
    expected = torch.autograd.grad((dense(head, hidden, targets)[0] * weights).sum(), [head.weight, hidden])
    torch.testing.assert_close((head.weight.grad, hidden.grad), expected)


@pytest.mark.parametrize("kind", [nn.Linear, CountingHead])
def test_nothing_of_size_vocab_is_kept(kind: type[nn.Linear]) -> None:
    head, hidden, targets, weights = make_inputs(8, kind)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        for token_weights, is_trainable in ((weights, True), (None, True), (None, False)):
            head.weight.requires_grad_(is_trainable)
            score_targets(head, hidden, targets, VOCAB, token_weights=token_weights, max_chunk_logits=2 * VOCAB)
    assert max(saved, default=0) <= max(hidden.numel(), head.weight.numel()) < len(hidden) * VOCAB


def test_without_grad_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets, weights = make_inputs(4)
    expected = dense(head, hidden, targets)[0].detach()
    wanted: list[tuple[bool, ...]] = []
    make = fused_head._gradient_buffers
    monkeypatch.setattr(
        fused_head, "_gradient_buffers", lambda *arguments: wanted.append(arguments[-1]) or make(*arguments)
    )
    with torch.no_grad():
        loss, nll, _ = score_targets(head, hidden, targets, VOCAB, token_weights=weights)
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(loss, (expected * weights).sum())
    head.requires_grad_(False)
    score_targets(head, hidden.detach(), targets, VOCAB, token_weights=weights)
    assert wanted == [(False, False, False)] * 2
    score_targets(head, hidden, targets, VOCAB, token_weights=weights)
    assert wanted[2:] == [(True, False, False)]


def test_budget_smaller_than_a_row_still_scores_every_row() -> None:
    head, hidden, targets, _ = make_inputs(4)
    _, nll, _ = score_targets(head, hidden, targets, VOCAB, max_chunk_logits=1)
    torch.testing.assert_close(nll, dense(head, hidden, targets)[0])


@pytest.mark.parametrize(("count", "forward_calls", "total_calls"), [(4, 1, 1), (9, 3, 6), (0, 1, 1)])
def test_one_small_chunk_is_not_recomputed(count: int, forward_calls: int, total_calls: int) -> None:
    head, hidden, targets, _ = make_inputs(count, CountingHead)
    _, nll, _ = score_targets(head, hidden, targets, VOCAB, max_chunk_logits=4 * VOCAB)
    assert head.calls == forward_calls
    nll.sum().backward()
    assert head.calls == total_calls
    assert head.largest <= 4
    head.calls = 0
    with torch.no_grad():
        score_targets(head, hidden, targets, VOCAB, max_chunk_logits=4 * VOCAB)
    assert head.calls == forward_calls


def double_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def set_forward(head: Any) -> None:
    head.forward = lambda hidden: F.linear(hidden, head.weight) * 2


ALTERATIONS = {
    "hook": lambda head: head.register_forward_hook(double_output),
    "pre_hook": lambda head: head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "backward_hook": lambda head: head.register_full_backward_hook(lambda *_: None),
    "forward": set_forward,
    "parametrized": lambda head: nn.utils.parametrizations.weight_norm(head),
}


@pytest.mark.parametrize("alteration", list(ALTERATIONS))
def test_heads_that_do_more_than_a_linear_are_called(alteration: str) -> None:
    head, hidden, targets, weights = make_inputs(6)
    assert plain_linear(head, hidden) is head
    ALTERATIONS[alteration](head)
    assert plain_linear(head, hidden) is None
    inputs = trainable(head, hidden)
    loss, _, _ = score_targets(head, hidden, targets, VOCAB, token_weights=weights, max_chunk_logits=2 * VOCAB)
    expected = (dense(head, hidden, targets)[0] * weights).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


def test_a_head_of_another_dtype_fails_as_calling_it_does() -> None:
    head, hidden, targets, weights = make_inputs(3)
    with pytest.raises(RuntimeError, match="dtype"):
        score_targets(head.float(), hidden, targets, VOCAB, token_weights=weights)


LORAS = {
    "lora_on_head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "attention_only": {},
}


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("lora", list(LORAS))
def test_adapters_are_used_and_trained(
    lora: str, weighted: bool, disabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlm_tune.models.lm_head.MAX_CHUNK_LOGITS", 300)
    configuration = {"target_modules": ["q_proj"], "init_lora_weights": False} | LORAS[lora]
    model = get_peft_model(tiny_llada(), LoraConfig(r=2, **configuration))
    head = model.base_model.model.lm_head
    if lora == "modules_to_save":
        with torch.no_grad():
            head.modules_to_save["default"].weight.mul_(2)
        assert plain_linear(head, torch.zeros(1, 32)) is head.modules_to_save["default"]
    tokens = torch.randint(3, 100, (2, 9))
    selected = tokens > 40
    weights = torch.rand(2, 9)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained) == (lora != "attention_only")
    model.base_model.model.get_input_embeddings().weight.requires_grad_()  # something to train without the adapter
    if disabled:
        model.base_model.disable_adapter_layers()
    inputs = [p for p in model.parameters() if p.requires_grad]
    scores = model(
        input_ids=tokens, target_ids=tokens, target_mask=selected, target_weights=weights if weighted else None
    )
    loss = scores.loss if weighted else scores.token_nll @ weights[selected]
    logits = model(input_ids=tokens).logits[selected]
    dense_nll = F.cross_entropy(logits, tokens[selected], reduction="none")
    torch.testing.assert_close(scores.token_nll, dense_nll)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    expected = torch.autograd.grad(dense_nll @ weights[selected], inputs, allow_unused=True)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_tied_head_collects_both_gradients(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llada(weight_tying=True)
    tokens, weights = torch.randint(3, 100, (2, 9)), torch.rand(2, 9)
    selected = tokens > 40
    table = model.model.embed_tokens.weight
    assert model.lm_head.weight is table
    logits = model(input_ids=tokens).logits[selected]
    nll = F.cross_entropy(logits, tokens[selected], reduction="none")
    expected = torch.autograd.grad(nll @ weights[selected], table)[0]
    monkeypatch.setattr("dlm_tune.models.lm_head.MAX_CHUNK_LOGITS", 300)
    scores = model(
        input_ids=tokens, target_ids=tokens, target_mask=selected, target_weights=weights if weighted else None
    )
    loss = scores.loss if weighted else scores.token_nll @ weights[selected]
    torch.testing.assert_close(torch.autograd.grad(loss, table)[0], expected, rtol=1e-4, atol=1e-5)


def test_quantised_head_is_called() -> None:
    quantised = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 128, bias=False, quant_type="nf4")
    quantised.weight.requires_grad_(False)
    head = quantised.to("cpu")
    hidden = torch.randn(6, 64, requires_grad=True)
    targets, weights = torch.randint(0, 128, (6,)), torch.rand(6)
    assert plain_linear(head, hidden) is None
    loss, _, _ = score_targets(head, hidden, targets, 128, token_weights=weights, max_chunk_logits=256)
    expected = dense(head, hidden, targets)[0] @ weights
    torch.testing.assert_close(loss, expected)
    gradient, reference = (torch.autograd.grad(value, hidden)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_bfloat16_weight_gradients_are_summed_in_float32() -> None:
    """Hundreds of chunks of one row: a bfloat16 sum stops growing once a term is 1/256 of it."""
    torch.manual_seed(0)
    head = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
    hidden = torch.ones(2000, 4, dtype=torch.bfloat16)
    targets = torch.zeros(2000, dtype=torch.long)
    loss, _, _ = score_targets(head, hidden, targets, 3, token_weights=torch.ones(2000), max_chunk_logits=3)
    assert loss is not None
    loss.backward()
    probabilities = head(hidden[:1]).float().softmax(-1)[0]
    expected = 2000 * (probabilities - torch.tensor([1.0, 0.0, 0.0]))[:, None].expand(3, 4)
    assert head.weight.grad is not None
    torch.testing.assert_close(head.weight.grad.float(), expected, rtol=0.02, atol=1.0)
