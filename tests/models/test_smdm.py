"""SMDM's checkpoints give the logits and the likelihood of SMDM's model, here written out in plain torch."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dlm_tune.models import load_model, load_tokenizer
from dlm_tune.models.adapters import complete_peft_config
from dlm_tune.models.smdm import ARCHITECTURES, convert_smdm
from tests.models.layouts import config_json, logits_of
from tests.tiny_models import tiny_tokenizer

LAYERS, HEADS, WIDTH, MLP_WIDTH = 2, 4, 32, 48


def vocabulary_size() -> int:
    """V, without the mask token."""
    return len(plain_tokenizer())


def plain_tokenizer():
    """A tokenizer whose last token is the last row of the LM head, as Llama's: it has no mask token."""
    tokenizer = tiny_tokenizer("llada", chat_template=False)
    tokenizer.mask_token = None
    return tokenizer


def smdm_tensors(groups: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the names of ML-GSAI/SMDM's `TransEncoder`, with its shapes."""
    generator = torch.Generator().manual_seed(seed)
    size = WIDTH // HEADS

    def normal(*shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    vocab_size = vocabulary_size()
    tensors = {"lm_head.weight": normal(vocab_size, WIDTH), "transformer.wte.weight": normal(vocab_size + 1, WIDTH)}
    tensors["transformer.ln_f.weight"] = 1 + normal(WIDTH)
    for layer in range(LAYERS):
        prefix = f"transformer.h.{layer}."
        tensors[prefix + "norm_1.weight"] = 1 + normal(WIDTH)
        tensors[prefix + "norm_2.weight"] = 1 + normal(WIDTH)
        tensors[prefix + "attn.attn.weight"] = normal((HEADS + 2 * groups) * size, WIDTH)
        tensors[prefix + "attn.proj.weight"] = normal(WIDTH, WIDTH)
        tensors[prefix + "mlp.swiglu.w1.weight"] = normal(MLP_WIDTH, WIDTH)
        tensors[prefix + "mlp.swiglu.w2.weight"] = normal(MLP_WIDTH, WIDTH)
        tensors[prefix + "mlp.swiglu.w3.weight"] = normal(WIDTH, MLP_WIDTH)
    return tensors


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x: Tensor) -> Tensor:
    """(B, L, size) with each pair (i, i + size / 2) turned by position / 10000^(2 i / size), as complex numbers."""
    size = x.shape[-1]
    pairs = torch.complex(x[..., : size // 2].double(), x[..., size // 2 :].double())
    frequencies = torch.tensor([10000.0 ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def smdm_logits(tensors: dict[str, Tensor], input_ids: Tensor, groups: int) -> Tensor:
    """Logits (B, L, V) of SMDM's model: one loop over heads, attention from its definition."""
    size, queries = WIDTH // HEADS, HEADS // groups
    x = tensors["transformer.wte.weight"][input_ids]
    for layer in range(LAYERS):
        block = {key: tensors[f"transformer.h.{layer}.{key}"] for key in (
            "norm_1.weight", "norm_2.weight", "attn.attn.weight", "attn.proj.weight", "mlp.swiglu.w1.weight",
            "mlp.swiglu.w2.weight", "mlp.swiglu.w3.weight")}  # fmt: skip
        fused = rms_norm(x, block["norm_1.weight"]) @ block["attn.attn.weight"].T
        heads = []
        for head in range(HEADS):
            # a group's rows: its queries, then one key, then one value
            start = (head // queries) * (queries + 2)
            columns = [start + head % queries, start + queries, start + queries + 1]
            q, k, v = (fused[..., column * size : (column + 1) * size] for column in columns)
            scores = rotate(q) @ rotate(k).transpose(1, 2) / math.sqrt(size)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, dim=-1) @ block["attn.proj.weight"].T
        y = rms_norm(x, block["norm_2.weight"])
        gate = y @ block["mlp.swiglu.w1.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ block["mlp.swiglu.w2.weight"].T)) @ block["mlp.swiglu.w3.weight"].T
    return rms_norm(x, tensors["transformer.ln_f.weight"]) @ tensors["lm_head.weight"].T


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    plain_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[HEADS, 2, 1], ids=lambda groups: f"{groups}_groups")
def converted(request, words, tmp_path_factory):
    """(tensors, number of groups, directory of the converted checkpoint)"""
    folder = tmp_path_factory.mktemp("smdm")
    tensors = smdm_tensors(request.param)
    save_file(tensors, folder / "mdm.safetensors")
    convert_smdm(folder / "mdm.safetensors", folder / "llama", tokenizer=words, num_heads=HEADS)
    return tensors, request.param, folder / "llama"


def some_tokens(length: int = 24) -> Tensor:
    """Two rows, a third of them masked."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, vocabulary_size(), (2, length), generator=generator)
    return tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.3, vocabulary_size())


def test_logits_are_those_of_the_authors_model(converted):
    tensors, groups, directory = converted
    tokens = some_tokens()
    expected = smdm_logits(tensors, tokens, groups)
    model = load_model(directory, dtype="float32")
    found = logits_of(model, tokens)
    torch.testing.assert_close(found[..., :-1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.softmax(-1)[..., :-1], expected.softmax(-1), atol=1e-6, rtol=1e-5)
    assert found.softmax(-1)[..., -1].max() == 0
    # without dlm_tune's loader: the same logits, and a last column to be dropped
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    torch.testing.assert_close(logits_of(plain, tokens)[..., :-1], expected, atol=1e-5, rtol=1e-5)


def test_likelihood_runs_over_the_authors_columns(converted):
    tensors, groups, directory = converted
    model = load_model(directory, dtype="float32")
    tokens = some_tokens()
    masked = tokens == model.config.mask_token_id
    targets = torch.randint(3, vocabulary_size(), tokens.shape)
    expected = F.cross_entropy(smdm_logits(tensors, tokens, groups)[masked], targets[masked], reduction="none")
    with torch.no_grad():
        nll = model(tokens, target_ids=targets, target_mask=masked).token_nll
    torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)


def test_gradients_are_finite_and_leave_the_zero_row_alone(converted):
    *_, directory = converted
    model = load_model(directory, dtype="float32").train()
    tokens = some_tokens()
    masked = tokens == model.config.mask_token_id
    weights = torch.ones(tokens.shape)
    targets = torch.full_like(tokens, 5)
    model(tokens, target_ids=targets, target_mask=masked, target_weights=weights).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["lm_head.weight"][:-1].abs().max() > 0
    assert gradients["lm_head.weight"][-1].abs().max() == 0


def test_adapters_and_quantised_layers_keep_the_mask_token_out(converted, tmp_path):
    *_, directory = converted
    settings = (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    )
    for number, kind in enumerate(settings):
        model = get_peft_model(
            load_model(directory, dtype="float32"), LoraConfig(r=2, init_lora_weights=False, **kind)
        )
        model.save_pretrained(tmp_path / str(number))
        again = load_model(tmp_path / str(number), dtype="float32")
        found = logits_of(again, some_tokens())
        assert torch.equal(found, logits_of(model, some_tokens()))
        assert found.softmax(-1)[..., -1].max() == 0
    quantised = load_model(directory, dtype="float32", quantization="8bit")
    assert logits_of(quantised, some_tokens()).softmax(-1)[..., -1].max() == 0
    with pytest.raises(ValueError, match="trainable_token_indices names lm_head, where PEFT leaves out the bias"):
        complete_peft_config(LoraConfig(trainable_token_indices={"lm_head": [3]}), load_model(directory))


def test_facts_of_the_converted_checkpoint(converted, tmp_path):
    _, groups, directory = converted
    content = config_json(directory)
    mask = vocabulary_size()
    facts = {
        "model_type": "llama", "is_causal": False, "logits_shift": False, "mask_token_id": mask,
        "vocab_size": mask + 1, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "excludes_mask_logit": True,
        "num_attention_heads": HEADS, "num_key_value_heads": groups, "max_position_embeddings": 2048,
        "intermediate_size": MLP_WIDTH,
    }  # fmt: skip
    assert {name: content[name] for name in facts} == facts
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", mask)
    # a saved copy, which a training run writes, is the same checkpoint
    model = load_model(directory, dtype="float32")
    model.save_pretrained(tmp_path)
    tokens = some_tokens()
    assert torch.equal(logits_of(load_model(tmp_path, dtype="float32"), tokens), logits_of(model, tokens))


def test_bfloat16_and_training_checkpoints_are_read(words, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in smdm_tensors(HEADS).items()}
    torch.save({"model": tensors, "iter_num": 3}, tmp_path / "iter.pth")
    result = convert_smdm(tmp_path / "iter.pth", tmp_path / "a", tokenizer=words, num_heads=HEADS)
    assert result.dtype == torch.bfloat16
    save_file(tensors, tmp_path / "mdm.safetensors")
    convert_smdm(tmp_path / "mdm.safetensors", tmp_path / "b", tokenizer=words, num_heads=HEADS)
    for folder in ("a", "b"):
        model = load_model(tmp_path / folder, dtype="auto")
        assert model.dtype == torch.bfloat16
        assert torch.equal(model.get_input_embeddings().weight, tensors["transformer.wte.weight"])


def test_architecture_is_found_by_its_sizes(words, tmp_path, monkeypatch):
    save_file(smdm_tensors(HEADS), tmp_path / "mdm.safetensors")
    arguments = {"weights_file": tmp_path / "mdm.safetensors", "output_dir": tmp_path / "out", "tokenizer": words}
    with pytest.raises(ValueError, match="2 layers of width 32 with MLPs of width 48, sizes of no known architecture"):
        convert_smdm(**arguments)
    monkeypatch.setitem(ARCHITECTURES, "Diff_LLaMA_tiny", (LAYERS, HEADS, WIDTH, MLP_WIDTH))
    with pytest.raises(ValueError, match=r"architecture=Diff_LLaMA_6M, but .*: it is Diff_LLaMA_tiny"):
        convert_smdm(**arguments, architecture="Diff_LLaMA_6M")
    with pytest.raises(ValueError, match="leave num_heads=4 out"):
        convert_smdm(**arguments, architecture="Diff_LLaMA_tiny", num_heads=4)
    convert_smdm(**arguments)
    assert config_json(tmp_path / "out")["num_attention_heads"] == HEADS


def test_sizes_of_the_authors_table():
    sizes = {(layers, width, mlp_width) for layers, _, width, mlp_width in ARCHITECTURES.values()}
    assert len(sizes) == len(ARCHITECTURES) == 30
    assert all(width % heads == 0 for _, heads, width, _ in ARCHITECTURES.values())
    assert ARCHITECTURES["Diff_LLaMA_1028M"] == (20, 14, 1792, 7168)
    # the name says the number of parameters beside the two tables
    for name, (layers, _, width, mlp_width) in ARCHITECTURES.items():
        millions = layers * (4 * width**2 + 3 * width * mlp_width) / 1e6
        assert math.isclose(millions, float(name.split("_")[-1].removesuffix("M")), rel_tol=0.06)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("transformer.h.1.attn.proj.weight"), "1 tensors are missing or unknown"),
        (lambda tensors: tensors.update({"transformer.extra": torch.ones(1)}), r"unknown \(transformer\.extra\)"),
        (lambda tensors: tensors.update({"transformer.wte.weight": tensors["lm_head.weight"].clone()}),
         "one embedding row more"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(damage, message, words, tmp_path):
    tensors = smdm_tensors(HEADS)
    damage(tensors)
    save_file(tensors, tmp_path / "mdm.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_smdm(tmp_path / "mdm.safetensors", tmp_path / "out", tokenizer=words, num_heads=HEADS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mdm.safetensors"]


def test_other_settings_are_refused(words, tmp_path):
    file = tmp_path / "mdm.safetensors"
    save_file(smdm_tensors(2), file)

    def convert(**changes):
        convert_smdm(**({"weights_file": file, "output_dir": tmp_path / "out", "tokenizer": words} | changes))

    with pytest.raises(ValueError, match="architecture='Diff_LLaMA_7B' is unknown"):
        convert(architecture="Diff_LLaMA_7B")
    for num_heads in (-1, 0, 3, 32, 64):
        with pytest.raises(ValueError, match=f"num_heads={num_heads} does not fit"):
            convert(num_heads=num_heads)
    other = tiny_tokenizer("llada")  # whose mask token lies elsewhere
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"behind its vocabulary, but in the tokenizer .*other' it is 2"):
        convert(num_heads=HEADS, tokenizer=tmp_path / "other")
    with pytest.raises(ValueError, match=r"nowhere\.safetensors is not a file"):
        convert(weights_file=tmp_path / "nowhere.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read as tensors"):
        convert(weights_file=tmp_path / "cut.safetensors")
    torch.save({"model": Unpickled()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth cannot be read .* could run code"):
        convert(weights_file=tmp_path / "code.pth")
    assert not (tmp_path / "out").exists()


class Unpickled:
    """An object whose unpickling would run code of its own."""
