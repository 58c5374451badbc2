"""The chunked head equals the dense cross-entropy in values and gradients, whatever the head."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dlm_tune.models.lm_head import score_targets
from tests.tiny_models import tiny_llada

VOCAB, WIDTH = 11, 5


def make_inputs(count: int, seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float32)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, WIDTH, generator=generator))
    hidden = torch.randn(count, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCAB, (count,), generator=generator)
    weights = torch.rand(count, generator=generator)
    return head, hidden, targets, weights


def dense(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@pytest.mark.parametrize("trainable", [True, False])
@given(count=st.integers(0, 9), rows=st.integers(1, 10))
@settings(deadline=None, max_examples=25)
def test_values_and_gradients_equal_dense(trainable: bool, count: int, rows: int) -> None:
    head, hidden, targets, weights = make_inputs(count)
    head.weight.requires_grad_(trainable)
    inputs = (hidden, head.weight) if trainable else (hidden,)
    _, nll, hits = score_targets(head, hidden, targets, VOCAB, max_chunk_logits=rows * VOCAB)
    gradients = torch.autograd.grad((nll * weights).sum(), inputs)
    expected_nll, expected_hits = dense(head, hidden, targets)
    expected = torch.autograd.grad((expected_nll * weights).sum(), inputs)
    assert torch.equal(hits, expected_hits)
    torch.testing.assert_close(nll, expected_nll, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-6)


def test_budget_smaller_than_a_row_still_scores_every_row() -> None:
    head, hidden, targets, _ = make_inputs(4)
    _, nll, _ = score_targets(head, hidden, targets, VOCAB, max_chunk_logits=1)
    torch.testing.assert_close(nll, dense(head, hidden, targets)[0])


class CountingHead(nn.Linear):
    """Counts its calls and remembers the most rows it was given."""

    calls = 0
    largest = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        self.largest = max(self.largest, hidden.shape[0])
        return super().forward(hidden)


@pytest.mark.parametrize(("count", "forward_calls", "total_calls"), [(4, 1, 1), (9, 3, 6), (0, 1, 1)])
def test_one_small_chunk_is_not_recomputed(count: int, forward_calls: int, total_calls: int) -> None:
    head = CountingHead(WIDTH, VOCAB, bias=False)
    _, hidden, targets, _ = make_inputs(count)
    _, nll, _ = score_targets(head, hidden, targets, VOCAB, max_chunk_logits=4 * VOCAB)
    assert head.calls == forward_calls
    nll.sum().backward()
    assert head.calls == total_calls
    assert head.largest <= 4
    head.calls = 0
    with torch.no_grad():
        score_targets(head, hidden, targets, VOCAB, max_chunk_logits=4 * VOCAB)
    assert head.calls == forward_calls


def test_chunks_keep_no_logits_and_a_frozen_head_no_gradient() -> None:
    head, hidden, targets, _ = make_inputs(8)
    head.weight.requires_grad_(False)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        _, nll, _ = score_targets(head, hidden, targets, VOCAB, max_chunk_logits=2 * VOCAB)
    assert max(saved, default=0) <= 2 * WIDTH
    nll.sum().backward()
    assert head.weight.grad is None


def test_loss_is_float32_under_bfloat16_autocast() -> None:
    """The logits are bfloat16 there; the log-softmax over them must not be."""
    head, hidden, targets, weights = make_inputs(9)
    with torch.autocast("cpu", torch.bfloat16):
        _, nll, _ = score_targets(head, hidden, targets, VOCAB, max_chunk_logits=2 * VOCAB)
        logits = head(hidden)
    assert (logits.dtype, nll.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(nll, F.cross_entropy(logits.float(), targets, reduction="none"), rtol=0, atol=1e-6)
    gradient = torch.autograd.grad((nll * weights).sum(), hidden)[0]
    exact = torch.autograd.grad((dense(head, hidden, targets)[0] * weights).sum(), hidden)[0]
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("lora", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_the_head_are_used_and_trained(lora: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlm_tune.models.lm_head.MAX_CHUNK_LOGITS", 300)
    settings = {"target_modules": ["q_proj"], "init_lora_weights": False} | lora
    model = get_peft_model(tiny_llada(), LoraConfig(r=2, **settings))
    if "modules_to_save" in lora:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    tokens = torch.randint(3, 100, (2, 9))
    selected = tokens > 40
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained)

    nll = model(input_ids=tokens, target_ids=tokens, target_mask=selected).token_nll
    gradients = torch.autograd.grad(nll.sum(), list(trained.values()))
    logits = model(input_ids=tokens).logits[selected]
    dense_nll = F.cross_entropy(logits, tokens[selected], reduction="none")
    expected = torch.autograd.grad(dense_nll.sum(), list(trained.values()))
    torch.testing.assert_close(nll, dense_nll)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def test_tied_head_collects_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llada(weight_tying=True)
    tokens = torch.randint(3, 100, (2, 9))
    selected = tokens > 40
    table = model.model.embed_tokens.weight
    assert model.lm_head.weight is table
    logits = model(input_ids=tokens).logits[selected]
    expected = torch.autograd.grad(F.cross_entropy(logits, tokens[selected], reduction="sum"), table)[0]
    monkeypatch.setattr("dlm_tune.models.lm_head.MAX_CHUNK_LOGITS", 300)
    nll = model(input_ids=tokens, target_ids=tokens, target_mask=selected).token_nll
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), table)[0], expected, rtol=1e-4, atol=1e-5)
