"""The three modes of the forward, padding, and the logits shift."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dlm_tune.models import DiffusionMixin
from dlm_tune.models.loading import _bidirectional
from dlm_tune.models.mixin import padded_position_ids
from tests.models.layouts import logits_of
from tests.tiny_models import tiny_dream, tiny_llada


def tiny_decoder(config_class: type, model_class: type, logits_shift: bool) -> Any:
    config = config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=128,
        initializer_range=0.2,
    )
    config.is_causal, config.logits_shift, config.mask_token_id = False, logits_shift, 2
    torch.manual_seed(0)
    return _bidirectional(model_class)(config).eval()


MODELS = {
    "llada": tiny_llada,
    "dream": tiny_dream,
    "llama": lambda: tiny_decoder(LlamaConfig, LlamaForCausalLM, False),
    "qwen3_shifted": lambda: tiny_decoder(Qwen3Config, Qwen3ForCausalLM, True),
}
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
all_models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def ragged_rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 120, (length,), generator=generator) for length in (9, 4, 1)]


def pad(rows: list[Tensor], side: str, extra: int = 2) -> tuple[Tensor, Tensor]:
    """Rows padded with id 0 to a common length, and their attention mask."""
    length = max(map(len, rows)) + extra
    tokens, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[index, place], mask[index, place] = row, 1
    return tokens, mask


@both_attentions
@all_models
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_unpadded_rows(build: Any, attention: str, side: str) -> None:
    model = build()
    model.set_attn_implementation(attention)
    tokens, mask = pad(ragged_rows(), side)
    batched = logits_of(model, tokens, mask)
    for index, row in enumerate(ragged_rows()):
        alone = logits_of(model, row[None])[0]
        assert (batched[index][mask[index].bool()] - alone).abs().max() < 1e-5


@all_models
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_influences_scores_or_predictions(build: Any, side: str) -> None:
    """Every target, the first token of a row included, is scored as in the unpadded row."""
    model = build()
    tokens, mask = pad(ragged_rows(), side)
    with torch.no_grad():
        scores = model(input_ids=tokens, attention_mask=mask, target_ids=tokens, target_mask=mask.bool())
        logits = model.predict_logits(tokens, mask, mask.bool())
        alone = [model(input_ids=row[None], target_ids=row[None], target_mask=row[None] > 0) for row in ragged_rows()]
    torch.testing.assert_close(scores.token_nll, torch.cat([a.token_nll for a in alone]), rtol=0, atol=1e-5)
    assert torch.equal(scores.is_top1, torch.cat([a.is_top1 for a in alone]))
    nll = F.cross_entropy(logits, tokens[mask.bool()], reduction="none")
    torch.testing.assert_close(scores.token_nll, nll, rtol=0, atol=1e-5)


@both_attentions
@all_models
def test_attention_is_bidirectional_and_padding_is_invisible(build: Any, attention: str) -> None:
    model = build()
    model.set_attn_implementation(attention)
    tokens, mask = torch.randint(3, 120, (1, 6)), torch.tensor([[1, 1, 1, 1, 1, 0]])
    before = logits_of(model, tokens, mask)
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 120
    assert (logits_of(model, changed, mask) - before)[0, 0].abs().max() > 1e-3
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 120
    assert torch.equal(logits_of(model, changed, mask)[0, :5], before[0, :5])


@both_attentions
@all_models
def test_row_of_padding_only_gives_no_nan(build: Any, attention: str) -> None:
    model = build()
    model.set_attn_implementation(attention)
    tokens, mask = torch.randint(3, 120, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    scores = model(input_ids=tokens, attention_mask=mask, target_ids=tokens, target_mask=mask.bool())
    scores.token_nll.sum().backward()
    assert torch.isfinite(logits_of(model, tokens, mask)).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    alone = logits_of(model, tokens[:1, :3])
    assert (logits_of(model, tokens, mask)[:1, :3] - alone).abs().max() < 1e-5


@both_attentions
def test_boolean_block_mask_separates_packed_documents(attention: str) -> None:
    model = tiny_llada()
    model.set_attn_implementation(attention)
    tokens = torch.randint(3, 120, (1, 8))
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    mask = (document[:, None] == document[None, :])[None, None]
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(input_ids=tokens, attention_mask=mask, position_ids=position_ids).logits
    for part in (slice(0, 3), slice(3, 8)):
        assert (packed[:, part] - logits_of(model, tokens[:, part])).abs().max() < 1e-5


def test_position_ids_count_from_the_first_attended_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
    expected = [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert padded_position_ids(mask).tolist() == expected


@all_models
def test_modes_agree_with_plain_logits(build: Any) -> None:
    model = build()
    tokens = torch.randint(3, 120, (2, 7))
    selected = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1, 0]]).bool()
    plain = logits_of(model, tokens)
    if model.config.logits_shift:
        # Dream's own statement of its shift.
        plain = torch.cat([plain[:, :1], plain[:, :-1]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=tokens, position_mask=selected).logits
        scores = model(input_ids=tokens, target_ids=tokens, target_mask=selected)
    assert logits.shape == (6, 128)
    torch.testing.assert_close(logits, plain[selected], rtol=0, atol=1e-5)
    expected = F.cross_entropy(plain[selected], tokens[selected], reduction="none")
    torch.testing.assert_close(scores.token_nll, expected, rtol=0, atol=1e-5)
    assert torch.equal(scores.is_top1, plain[selected].argmax(-1) == tokens[selected])


@all_models
def test_gradients_equal_dense(build: Any) -> None:
    tokens = torch.randint(3, 120, (2, 7))
    selected = tokens > 60
    gradients = []
    for mode in ("scores", "dense"):
        model = build().double()
        if mode == "scores":
            nll = model(input_ids=tokens, target_ids=tokens, target_mask=selected).token_nll
        else:
            logits = model(input_ids=tokens).logits
            if model.config.logits_shift:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            nll = F.cross_entropy(logits[selected], tokens[selected], reduction="none")
        nll.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


@both_attentions
@pytest.mark.parametrize("side", ["left", "right"])
def test_shift_with_padding_and_with_a_4d_mask(attention: str, side: str) -> None:
    """Each row is scored from the states before it, its first token from its own; given either kind of mask."""
    model = tiny_dream()
    model.set_attn_implementation(attention)
    tokens, mask = pad(ragged_rows(), side)
    targets = mask.bool()
    own = (targets[:, :, None] == targets[:, None, :])[:, None]
    arguments = {"input_ids": tokens, "position_mask": targets}
    with torch.no_grad():
        two_dimensional = model(attention_mask=mask, **arguments).logits
        documents = model(document_ids=mask * torch.arange(1, 4)[:, None], **arguments).logits
    alone = [logits_of(model, row[None])[0] for row in ragged_rows()]
    expected = torch.cat([torch.cat([logits[:1], logits[:-1]]) for logits in alone])
    torch.testing.assert_close(two_dimensional, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(documents, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        four_dimensional = model(attention_mask=own, position_ids=padded_position_ids(mask), **arguments).logits
    torch.testing.assert_close(four_dimensional, expected, rtol=0, atol=1e-5)


def test_shift_of_a_window_that_starts_inside_a_row() -> None:
    """The first column has no predecessor in the window, whatever its position."""
    model, tokens = tiny_dream(), torch.randint(3, 120, (1, 4))
    window = {"input_ids": tokens, "position_ids": torch.arange(5, 9)[None]}
    with torch.no_grad():
        plain = model(**window).logits
        selected = model(position_mask=torch.ones_like(tokens, dtype=torch.bool), **window).logits
    torch.testing.assert_close(selected, torch.cat([plain[0, :1], plain[0, :-1]]), rtol=0, atol=1e-5)


def test_documents_stand_for_the_mask_and_the_positions() -> None:
    model, tokens = tiny_llada(), torch.randint(3, 120, (1, 4))
    for other in ({"attention_mask": torch.ones(1, 4)}, {"position_ids": torch.arange(4)[None]}):
        with pytest.raises(ValueError, match="document_ids stand for attention_mask and position_ids"):
            model(input_ids=tokens, document_ids=torch.ones_like(tokens), **other)


def test_documents_pass_through_a_peft_model() -> None:
    model = tiny_dream()
    tokens, documents = torch.randint(3, 120, (1, 7)), torch.tensor([[1, 1, 1, 2, 2, 2, 2]])
    arguments = {"input_ids": tokens, "document_ids": documents, "target_ids": tokens, "target_mask": documents > 0}
    plain = model(**arguments).token_nll
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.testing.assert_close(peft_model(**arguments).token_nll, plain)


def test_empty_selection_is_a_differentiable_zero() -> None:
    model = tiny_dream()
    tokens = torch.randint(3, 120, (2, 7))
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    scores = model(input_ids=tokens, target_ids=tokens, target_mask=nothing)
    assert (scores.token_nll.shape, scores.token_nll.dtype) == ((0,), torch.float32)
    assert (scores.is_top1.shape, scores.is_top1.dtype) == ((0,), torch.bool)
    scores.token_nll.sum().backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())
    assert model.lm_head.weight.grad is not None  # DDP waits for every parameter's gradient
    assert model(input_ids=tokens, position_mask=nothing).logits.shape == (0, 128)


def test_all_logits_are_never_computed() -> None:
    model = tiny_llada()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    tokens = torch.randint(3, 120, (4, 16))
    selected = torch.zeros_like(tokens, dtype=torch.bool)
    selected[1, 3:6] = True
    model(input_ids=tokens, target_ids=tokens, target_mask=selected)
    model(input_ids=tokens, position_mask=selected)
    assert rows == [3, 3]


@pytest.mark.parametrize("build", [tiny_llada, tiny_dream])
def test_modes_pass_through_a_peft_model(build: Any) -> None:
    model = build()
    tokens = torch.randint(3, 120, (2, 7))
    selected = tokens > 60
    plain = model(input_ids=tokens, target_ids=tokens, target_mask=selected).token_nll
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped = peft_model(input_ids=tokens, target_ids=tokens, target_mask=selected).token_nll
    torch.testing.assert_close(wrapped, plain)
    assert peft_model(input_ids=tokens, position_mask=selected).logits.shape == (int(selected.sum()), 128)
    assert isinstance(peft_model.get_base_model(), DiffusionMixin)
    wrapped.sum().backward()
    assert all(p.grad is not None for p in peft_model.parameters() if p.requires_grad)


def test_autocast_scores_are_float32() -> None:
    model = tiny_llada()
    tokens = torch.randint(3, 120, (2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(input_ids=tokens, target_ids=tokens, target_mask=tokens > 0)
    assert scores.token_nll.dtype == torch.float32
    exact = model(input_ids=tokens, target_ids=tokens, target_mask=tokens > 0).token_nll
    torch.testing.assert_close(scores.token_nll, exact, rtol=0.1, atol=0.1)


def test_no_cache_is_built_unless_asked() -> None:
    model = tiny_dream(use_cache=True)
    tokens = torch.randint(3, 120, (1, 4))
    assert model(input_ids=tokens).past_key_values is None


def test_inconsistent_arguments_are_refused() -> None:
    model, tokens = tiny_llada(), torch.randint(3, 120, (2, 4))
    selected = tokens > 0
    with pytest.raises(ValueError, match=r"labels.*target_ids and target_mask"):
        model(input_ids=tokens, labels=tokens)
    with pytest.raises(ValueError, match="target_ids and target_mask belong together"):
        model(input_ids=tokens, target_mask=selected)
    with pytest.raises(ValueError, match="two modes"):
        model(input_ids=tokens, target_ids=tokens, target_mask=selected, position_mask=selected)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) .* \(2, 4\)"):
        model(input_ids=tokens, position_mask=selected[:, :3])


def test_prompt_learning_adapter_is_refused() -> None:
    model = get_peft_model(tiny_dream(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tokens = torch.randint(3, 120, (2, 4))
    with pytest.raises(ValueError, match="prompt-learning"):
        model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            target_ids=tokens,
            target_mask=tokens > 0,
        )


@all_models
def test_softcap_is_in_the_logits_and_in_the_scores(build: Any) -> None:
    """Whatever mode is asked for, capped logits decide."""
    model = build().double()
    tokens, selection = torch.arange(20, 28)[None], torch.zeros(1, 8, dtype=torch.bool)
    selection[0, [2, 5, 6]] = True
    plain = model(input_ids=tokens, position_mask=selection).logits
    model.config.final_logit_softcapping = 0.7
    capped = 0.7 * (plain / 0.7).tanh()
    torch.testing.assert_close(model(input_ids=tokens, position_mask=selection).logits, capped)
    expected = F.cross_entropy(capped, tokens[selection], reduction="none")
    for weights in (None, torch.ones(1, 8)):
        scores = model(input_ids=tokens, target_ids=tokens, target_mask=selection, target_weights=weights)
        torch.testing.assert_close(scores.token_nll, expected)
