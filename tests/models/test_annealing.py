"""Attention from causal to bidirectional: what is seen, how often, and by which models."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dlm_tune.models.annealing import (
    RightContext,
    annealed_attention,
    check_annealed_attention,
    right_context_share,
)
from dlm_tune.models.documents import document_position_ids
from tests.models.test_mixin import tiny_decoder
from tests.tiny_models import tiny_dream, tiny_llada

MODELS = {
    "llama": lambda: tiny_decoder(LlamaConfig, LlamaForCausalLM, False),
    "qwen3_shifted": lambda: tiny_decoder(Qwen3Config, Qwen3ForCausalLM, True),
}
all_models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])

# Two sequences: three documents, and two with padding between and behind.
DOCUMENT_IDS = torch.tensor([[1, 1, 1, 1, 2, 3, 3, 3, 3], [4, 4, 4, 0, 5, 5, 5, 0, 0]])
ROW_INDEX = DOCUMENT_IDS * 10


def attention(share: float, documents: Tensor = DOCUMENT_IDS, step: int = 7, seed: int = 3) -> Tensor:
    return annealed_attention(documents, documents * 10, RightContext(share, seed, step))[:, 0]


def annealed_logits(model: Any, tokens: Tensor, documents: Tensor, share: float) -> Tensor:
    mask = annealed_attention(documents, documents * 10, RightContext(share, 3, 7))
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, position_ids=document_position_ids(documents)).logits


def test_the_share_is_that_of_the_authors_trainer() -> None:
    """`min(1.0, (global_step + 1) / anneal_steps)`, global_step being 0 at the first step."""
    assert [right_context_share(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert right_context_share(0, 0) == right_context_share(0, 1) == 1.0


def test_the_past_is_always_seen_and_other_documents_never() -> None:
    same = DOCUMENT_IDS[:, :, None] == DOCUMENT_IDS[:, None, :]
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    for step in range(20):
        mask = attention(0.5, step=step)
        assert torch.equal(mask & past, same & past)
        assert not (mask & ~same).any()
        assert mask.diagonal(dim1=1, dim2=2).all(), "every token sees itself, padding too"
    assert torch.equal(attention(0.0), same & past)
    assert torch.equal(attention(1.0), same)


def test_later_tokens_are_seen_with_the_given_probability() -> None:
    """Over 2 * C(64, 2) = 4032 entries the standard error is at most 0.008."""
    documents = torch.tensor([[1] * 64, [2] * 64])
    future = torch.ones(2, 64, 64, dtype=torch.bool).triu(1)
    for share in (0.1, 0.5, 0.9):
        seen = attention(share, documents)[future].double()
        assert seen.mean() == pytest.approx(share, abs=3 * (share * (1 - share) / len(seen)) ** 0.5)
        # and at every distance alike: neither near nor far tokens come first
        for distance in (1, 32):
            diagonals = [attention(share, documents, step=step).diagonal(distance, 1, 2) for step in range(40)]
            count = sum(part.numel() for part in diagonals)
            mean = sum(part.sum().item() for part in diagonals) / count
            assert mean == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def test_each_step_row_and_seed_has_a_draw_of_its_own_that_grows_with_the_share() -> None:
    documents = torch.tensor([[1] * 32, [2] * 32])
    half = attention(0.5, documents)
    others = [half[1], attention(0.5, documents, step=8)[0], attention(0.5, documents, seed=4)[0]]
    future = torch.ones(32, 32, dtype=torch.bool).triu(1)
    for other in others:
        agreement = (half[0] == other)[future].double().mean()
        assert agreement == pytest.approx(0.5, abs=0.1), "independent of each other"
    assert not (half & ~attention(0.6, documents)).any()


def test_a_document_has_the_same_mask_wherever_it_lies() -> None:
    """Alone, behind another, padded on either side: its entries depend on its row and on places within it."""
    alone = annealed_attention(torch.ones(1, 5, dtype=torch.long), torch.full((1, 5), 42), RightContext(0.5, 3, 7))
    documents = torch.tensor([[9, 9, 4, 4, 4, 4, 4, 0, 0], [0, 0, 0, 0, 4, 4, 4, 4, 4]])
    mask = annealed_attention(documents, torch.where(documents == 4, 42, 17), RightContext(0.5, 3, 7))
    assert torch.equal(mask[0, 0, 2:7, 2:7], alone[0, 0])
    assert torch.equal(mask[1, 0, 4:, 4:], alone[0, 0])


@all_models
@both_attentions
def test_a_share_of_0_is_the_causal_model_and_1_the_bidirectional_one(build: Any, attention: str) -> None:
    model = build()
    model.set_attn_implementation(attention)
    tokens = torch.randint(3, 120, DOCUMENT_IDS.shape, generator=torch.Generator().manual_seed(3))
    for is_causal, share in ((True, 0.0), (False, 1.0)):
        annealed = annealed_logits(model, tokens, DOCUMENT_IDS, share)
        model.config.is_causal = is_causal
        for document in range(1, 6):
            row = tokens[document == DOCUMENT_IDS][None]
            with torch.no_grad():
                # causal: the class of transformers, untouched by the mixin
                alone = super(type(model).__mro__[1], model).forward(input_ids=row, use_cache=False).logits[0]
            torch.testing.assert_close(annealed[document == DOCUMENT_IDS], alone, rtol=0, atol=1e-5)
        model.config.is_causal = False
    assert (annealed_logits(model, tokens, DOCUMENT_IDS, 0.0) - annealed).abs().max() > 0.1


@all_models
@both_attentions
def test_a_token_reads_what_its_mask_shows_and_no_more(build: Any, attention: str) -> None:
    """One layer: the logits of a query depend on a key exactly where the mask says so."""
    model = build()
    model.set_attn_implementation(attention)
    model.model.layers = model.model.layers[:1]
    documents = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2]])
    mask = annealed_attention(documents, documents * 10, RightContext(0.5, 3, 7))
    positions = document_position_ids(documents)
    embedded = model.get_input_embeddings()(torch.arange(10, 18)[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions).logits
    for query in range(8):
        (gradient,) = torch.autograd.grad(logits[0, query].square().sum(), embedded, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(dim=-1) > 0, mask[0, 0, query])


def test_what_annealing_refuses() -> None:
    for model in (tiny_llada(), tiny_dream()):
        with pytest.raises(ValueError, match=r"was trained with attention in both directions.* Remove it"):
            check_annealed_attention(model)
    model = MODELS["llama"]()
    check_annealed_attention(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attn_implementation='flex_attention'.* with one of sdpa, eager"):
        check_annealed_attention(model)
