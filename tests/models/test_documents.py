"""Packed documents: no influence on each other, the logits and scores of the unpacked rows, the shift."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers import modeling_flash_attention_utils as flash_utils

from dlm_tune.models.documents import document_attention, document_position_ids
from tests.models.layouts import logits_of
from tests.models.test_mixin import tiny_decoder
from tests.tiny_models import tiny_dream, tiny_llada

MODELS = {
    "llada": tiny_llada,
    "dream": tiny_dream,
    "qwen3_shifted": lambda: tiny_decoder(Qwen3Config, Qwen3ForCausalLM, True),
}
all_models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])

# Two sequences: three documents, and two with padding behind.
DOCUMENT_IDS = torch.tensor([[1, 1, 1, 1, 2, 3, 3, 3, 3], [4, 4, 4, 4, 4, 5, 5, 0, 0]])
NUM_DOCUMENTS = 5


def packed_tokens() -> Tensor:
    return torch.randint(3, 120, DOCUMENT_IDS.shape, generator=torch.Generator().manual_seed(3))


def packed_logits(model: Any, tokens: Tensor, document_ids: Tensor = DOCUMENT_IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, document_ids=document_ids).logits


def shifted(logits: Tensor) -> Tensor:
    """Dream's own statement of its shift, for one document (L, V)."""
    return torch.cat([logits[:1], logits[:-1]])


def attend_to_variable_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """What the flash kernels compute for rows of unequal length, (total, heads, width), one row at a time."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert type(max_seqlen_q) is type(max_seqlen_k) is int
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    assert (int(cu_seqlens_q[0]), int(cu_seqlens_q[-1]), dropout_p) == (0, q.shape[0], 0.0)
    results = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        parts = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        result = F.scaled_dot_product_attention(*parts, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        results.append(result.transpose(0, 1))
    return torch.cat(results)


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> str:
    """Transformers' own path to the flash kernels, with the kernel replaced by plain torch."""
    kernels = (None, attend_to_variable_lengths, None, None, None)
    process = flash_utils._lazy_define_process_function(attend_to_variable_lengths)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda implementation: (kernels, (process, dict)))
    return "flash_attention_2"


def test_positions_restart_with_each_document() -> None:
    expected = [[0, 1, 2, 3, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 0, 1]]
    assert document_position_ids(DOCUMENT_IDS).tolist() == expected


@both_attentions
@all_models
@pytest.mark.parametrize("document", range(1, NUM_DOCUMENTS + 1))
def test_no_document_moves_a_logit_of_another_by_one_bit(build: Any, attention: str, document: int) -> None:
    model = build()
    model.set_attn_implementation(attention)
    tokens = packed_tokens()
    before = packed_logits(model, tokens)
    inside = document == DOCUMENT_IDS
    for position in inside.nonzero().tolist():
        changed = tokens.clone()
        changed[tuple(position)] = (changed[tuple(position)] + 60) % 120
        after = packed_logits(model, changed)
        assert torch.equal(after[~inside], before[~inside])
        moved = (after - before)[inside].abs().amax(dim=-1)
        assert (moved > 1e-4).all(), "within its document every token sees the change"


@both_attentions
@all_models
def test_loss_of_a_document_has_no_gradient_in_another(build: Any, attention: str) -> None:
    """Exactly zero, and not zero for every token of its own document."""
    model = build()
    model.set_attn_implementation(attention)
    tokens = packed_tokens()
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    for document in range(1, NUM_DOCUMENTS + 1):
        inside = document == DOCUMENT_IDS
        scores = model(inputs_embeds=embeddings, document_ids=DOCUMENT_IDS, target_ids=tokens, target_mask=inside)
        (gradient,) = torch.autograd.grad(scores.token_nll.sum(), embeddings)
        assert (gradient[~inside] == 0).all()
        assert (gradient[inside].abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@both_attentions
@all_models
def test_packed_documents_equal_unpacked_rows(
    build: Any, attention: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Logits, and the scores of every token, the first of a document included."""
    model = build().to(dtype)
    model.set_attn_implementation(attention)
    tokens = packed_tokens()
    logits = packed_logits(model, tokens)
    targets = DOCUMENT_IDS > 0
    with torch.no_grad():
        scores = model(input_ids=tokens, document_ids=DOCUMENT_IDS, target_ids=tokens, target_mask=targets)
        selected = model(input_ids=tokens, document_ids=DOCUMENT_IDS, position_mask=targets).logits
    expected_nll, expected_logits = [], []
    for document in range(1, NUM_DOCUMENTS + 1):
        inside = document == DOCUMENT_IDS
        alone = logits_of(model, tokens[inside][None])[0]
        torch.testing.assert_close(logits[inside], alone, rtol=0, atol=tolerance)
        expected_logits.append(shifted(alone) if model.config.logits_shift else alone)
        expected_nll.append(F.cross_entropy(expected_logits[-1], tokens[inside], reduction="none"))
    torch.testing.assert_close(selected, torch.cat(expected_logits), rtol=0, atol=tolerance)
    torch.testing.assert_close(scores.token_nll, torch.cat(expected_nll), rtol=0, atol=tolerance)


@both_attentions
def test_shifted_predictions_are_those_of_the_causal_model(attention: str) -> None:
    """With causal attention, position i of each document is predicted as the autoregressive model predicts it."""
    model = tiny_decoder(LlamaConfig, LlamaForCausalLM, True)
    model.config.is_causal = True
    model.set_attn_implementation(attention)
    causal = LlamaForCausalLM(model.config).eval()
    causal.load_state_dict(model.state_dict())
    tokens = packed_tokens()
    positions = document_position_ids(DOCUMENT_IDS)
    predicted = (DOCUMENT_IDS > 0) & (positions > 0)
    with torch.no_grad():
        logits = model(input_ids=tokens, document_ids=DOCUMENT_IDS, position_mask=predicted).logits
        expected = [causal(input_ids=tokens[n == DOCUMENT_IDS][None]).logits[0, :-1] for n in range(1, 6)]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-5)


@all_models
def test_flash_attention_gets_the_boundaries_of_the_documents(build: Any, flash_attention: str) -> None:
    """Logits and gradients through transformers' own flash path equal those of sdpa."""
    tokens, results = packed_tokens(), []
    for attention in ("sdpa", flash_attention):
        model = build()
        model.config._attn_implementation = attention
        scores = model(input_ids=tokens, document_ids=DOCUMENT_IDS, target_ids=tokens, target_mask=DOCUMENT_IDS > 0)
        scores.token_nll.sum().backward()
        results.append((packed_logits(model, tokens), [p.grad for p in model.parameters()]))
    (logits, gradients), (flash_logits, flash_gradients) = results
    torch.testing.assert_close(flash_logits[DOCUMENT_IDS > 0], logits[DOCUMENT_IDS > 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(flash_gradients, gradients, rtol=1e-4, atol=1e-5)


def test_boundaries_of_the_flattened_batch() -> None:
    model = tiny_llada()
    model.config._attn_implementation = "flash_attention_3"
    mask, arguments = document_attention(DOCUMENT_IDS, model)
    assert mask is None
    assert arguments["cu_seq_lens_q"].tolist() == [0, 4, 5, 9, 14, 16, 18]
    assert arguments["cu_seq_lens_k"] is arguments["cu_seq_lens_q"]
    assert (arguments["max_length_q"], arguments["max_length_k"]) == (9, 9)


def flex_logits(model: Any) -> Tensor:
    """On CPU flex attention runs without gradients only."""
    model.requires_grad_(False).set_attn_implementation("flex_attention")
    return packed_logits(model, packed_tokens())


@all_models
def test_flex_attention_gets_the_mask_of_the_documents(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention without compilation, for speed."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.WrappedFlexAttention", lambda _: lambda: flex_attention
    )
    expected = packed_logits(build(), packed_tokens())
    torch.testing.assert_close(flex_logits(build()), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_flex_attention() -> None:
    expected = packed_logits(tiny_llada(), packed_tokens())
    torch.testing.assert_close(flex_logits(tiny_llada()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_block_mask_equals_the_dense_mask(is_causal: bool) -> None:
    model = tiny_decoder(LlamaConfig, LlamaForCausalLM, False)
    model.config.is_causal = is_causal
    dense, _ = document_attention(DOCUMENT_IDS, model)
    model.config._attn_implementation = "flex_attention"
    blocks, _ = document_attention(DOCUMENT_IDS, model)
    assert blocks.shape == (2, 1, 9, 9)
    query, key = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    for sequence in range(2):
        number = torch.full_like(query, sequence)
        assert torch.equal(blocks.mask_mod(number, None, query, key), dense[sequence, 0])


def test_other_attention_implementations_are_refused() -> None:
    model = tiny_llada()
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match=r"'paged\|eager' cannot keep packed documents apart.*sdpa.*without packing"):
        model(input_ids=packed_tokens(), document_ids=DOCUMENT_IDS)


@all_models
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    build: Any, attention: str, use_reentrant: bool, flash_attention: str
) -> None:
    tokens, gradients = packed_tokens(), []
    calls: list[bool] = []
    for checkpointing in (False, True):
        model = build().train()
        model.config._attn_implementation = attention
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, kind=checkpointing: calls.append(kind))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        scores = model(input_ids=tokens, document_ids=DOCUMENT_IDS, target_ids=tokens, target_mask=DOCUMENT_IDS > 0)
        scores.token_nll.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    assert calls == [False, True, True], "with checkpointing the layer runs again in the backward pass"


def test_one_mask_is_built_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def counted(*arguments: Any) -> Any:
        built.append(arguments)
        return document_attention(*arguments)

    monkeypatch.setattr("dlm_tune.models.mixin.document_attention", counted)
    model = tiny_llada(n_layers=4)
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    packed_logits(model, packed_tokens())
    assert len(built) == 1
    assert len({mask.data_ptr() for mask in seen}) == 1


def test_padding_inside_a_sequence_separates_nothing_else() -> None:
    """A document that was shortened after collation leaves a gap before the next one."""
    ids = torch.tensor([[1, 1, 0, 0, 2, 2, 2, 0]])
    model, tokens = tiny_dream(), torch.arange(10, 18)[None]
    logits = packed_logits(model, tokens, ids)
    for document in (1, 2):
        alone = logits_of(model, tokens[ids == document][None])[0]
        torch.testing.assert_close(logits[ids == document], alone, rtol=0, atol=1e-5)
    assert torch.isfinite(logits).all()
