"""LLaDA: parity with the authors' code, original layout in and out, and refusals by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from dlm_tune.models import LLaDAConfig, LLaDAModelLM
from dlm_tune.models.llada import to_native_name
from tests.models.layouts import config_json, logits_of, saved_keys
from tests.tiny_models import tiny_llada

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llada_tiny_ref"


def as_llama(model: LLaDAModelLM) -> LlamaForCausalLM:
    """The same weights in transformers' own class, built from Llama's own config: an independent statement."""
    config = model.config
    llama = LlamaConfig(
        hidden_size=config.d_model,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.num_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.weight_tying,
        max_position_embeddings=config.max_sequence_length,
        is_causal=False,
    )
    native = LlamaForCausalLM(llama).eval()
    native.load_state_dict(model.state_dict())
    return native


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 0.0), ("eager", 1e-5)])
def test_logits_equal_the_reference(attention: str, tolerance: float) -> None:
    model = LLaDAModelLM.from_pretrained(FIXTURE, dtype=torch.float32, attn_implementation=attention)
    reference = load_file(FIXTURE / "reference.safetensors")
    logits = logits_of(model, reference["input_ids"], reference["attention_mask"])
    assert (logits - reference["logits"]).abs().max() <= tolerance
    real = reference["padded_attention_mask"].bool()
    padded = logits_of(model, reference["padded_input_ids"], reference["padded_attention_mask"])
    assert (padded - reference["padded_logits"])[real].abs().max() <= tolerance


def test_save_returns_the_original_files(tmp_path: Path) -> None:
    LLaDAModelLM.from_pretrained(FIXTURE, dtype=torch.float32).save_pretrained(tmp_path)
    original, saved = load_file(FIXTURE / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[key], saved[key]) for key in original)
    assert config_json(tmp_path) == config_json(FIXTURE)


def test_every_weight_has_one_native_name() -> None:
    names = saved_keys(FIXTURE)
    native = {to_native_name(name) for name in names}
    assert native == set(LLaDAModelLM.from_pretrained(FIXTURE).state_dict())
    assert len(native) == len(names)
    assert to_native_name("model.transformer.ff_out.weight") == "lm_head.weight"
    assert to_native_name("model.transformer.blocks.11.ff_out.weight") == "model.layers.11.mlp.down_proj.weight"


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
def test_auto_classes_take_the_native_class_without_remote_code(auto_class: type) -> None:
    # The fixture has an auto_map and no code files: executing remote code would fail.
    for trust_remote_code in (None, True):
        assert type(auto_class.from_pretrained(FIXTURE, trust_remote_code=trust_remote_code)) is LLaDAModelLM
    assert type(AutoConfig.from_pretrained(FIXTURE)) is LLaDAConfig


VARIANTS = {
    "gqa": {"n_kv_heads": 2},
    "multi_query": {"n_kv_heads": None, "multi_query_attention": True},
    "tied": {"weight_tying": True},
    "eps_theta": {"rms_norm_eps": 1e-2, "rope_theta": 10000.0},
    "embedding_gt_vocab": {"vocab_size": 120, "embedding_size": 128},
    "tied_embedding_gt_vocab": {"weight_tying": True, "vocab_size": 120, "embedding_size": 128},
    "nulls": {"n_kv_heads": None, "mlp_hidden_size": None, "embedding_size": None},
    "untouched": {},
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_variants_equal_llama_and_survive_a_round_trip(overrides: dict, tmp_path: Path) -> None:
    model = tiny_llada(**overrides)
    tokens = torch.randint(3, 100, (2, 9))
    assert torch.equal(logits_of(model, tokens), logits_of(as_llama(model), tokens))
    assert logits_of(model, tokens).shape[-1] == 128

    model.save_pretrained(tmp_path / "first")
    assert all(key.startswith("model.transformer.") for key in saved_keys(tmp_path / "first"))
    assert ("model.transformer.ff_out.weight" in saved_keys(tmp_path / "first")) != model.config.weight_tying
    for key, value in overrides.items():
        assert config_json(tmp_path / "first")[key] == value

    loaded = LLaDAModelLM.from_pretrained(tmp_path / "first")
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    loaded.save_pretrained(tmp_path / "second")
    assert config_json(tmp_path / "second") == config_json(tmp_path / "first")
    assert (tmp_path / "first/model.safetensors").read_bytes() == (tmp_path / "second/model.safetensors").read_bytes()


def test_qkv_bias_has_no_output_bias_and_changes_the_logits(tmp_path: Path) -> None:
    model = tiny_llada(include_qkv_bias=True)
    tokens = torch.randint(3, 100, (1, 9))
    before = logits_of(model, tokens)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).bias.normal_()
    assert model.model.layers[0].self_attn.o_proj.bias is None
    assert not torch.equal(logits_of(model, tokens), before)
    model.save_pretrained(tmp_path)
    assert "model.transformer.blocks.0.k_proj.bias" in saved_keys(tmp_path)
    assert torch.equal(logits_of(LLaDAModelLM.from_pretrained(tmp_path), tokens), logits_of(model, tokens))


def test_both_tables_in_a_tied_checkpoint_and_only_the_head(tmp_path: Path) -> None:
    model = tiny_llada(weight_tying=True)
    tokens = torch.randint(3, 100, (1, 9))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    table = weights["model.transformer.wte.weight"]
    weights["model.transformer.ff_out.weight"] = table.clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits_of(LLaDAModelLM.from_pretrained(tmp_path), tokens), logits_of(model, tokens))
    del weights["model.transformer.wte.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits_of(LLaDAModelLM.from_pretrained(tmp_path), tokens), logits_of(model, tokens))


def test_plain_load_state_dict_takes_original_names() -> None:
    """Trainer's resume and load-best do this with strict=False: without the hook they would keep the old weights."""
    saved = load_file(FIXTURE / "model.safetensors")
    model = LLaDAModelLM(AutoConfig.from_pretrained(FIXTURE))
    assert model.load_state_dict(dict(saved), strict=True).missing_keys == []
    tokens = torch.randint(3, 500, (1, 9))
    expected = logits_of(LLaDAModelLM.from_pretrained(FIXTURE, dtype=torch.float32), tokens)
    assert torch.equal(logits_of(model, tokens), expected)

    wrapper = torch.nn.ModuleDict({"module": LLaDAModelLM(AutoConfig.from_pretrained(FIXTURE))})
    wrapper.load_state_dict({f"module.{key}": value for key, value in saved.items()}, strict=True)
    assert torch.equal(logits_of(wrapper["module"], tokens), expected)


def test_sharded_save_and_resize(tmp_path: Path) -> None:
    model = tiny_llada(n_layers=3)
    model.resize_token_embeddings(140)
    assert (model.config.embedding_size, model.config.vocab_size) == (140, 140)
    tokens = torch.randint(3, 139, (1, 9))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert all(key.startswith("model.transformer.") for key in index["weight_map"])
    loaded = LLaDAModelLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.shape[0] == 140
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_directory_in_native_names_is_saved_in_original_names(tmp_path: Path) -> None:
    model = tiny_llada()
    model.save_pretrained(tmp_path / "native", save_original_format=False)
    assert "lm_head.weight" in saved_keys(tmp_path / "native")
    loaded = LLaDAModelLM.from_pretrained(tmp_path / "native")
    tokens = torch.randint(3, 100, (1, 9))
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    loaded.save_pretrained(tmp_path / "original")
    assert "model.transformer.ff_out.weight" in saved_keys(tmp_path / "original")


def test_lora_attaches_to_native_names_and_merges_into_original_ones(tmp_path: Path) -> None:
    model = tiny_llada()
    tokens = torch.randint(3, 100, (1, 9))
    peft_model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
    )
    assert not any("lm_head" in name for name, _ in peft_model.named_parameters() if "lora" in name)
    adapted = logits_of(peft_model, tokens)
    merged = peft_model.merge_and_unload()
    assert (logits_of(merged, tokens) - adapted).abs().max() < 1e-4
    merged.save_pretrained(tmp_path)
    assert all(key.startswith("model.transformer.") for key in saved_keys(tmp_path))
    assert torch.equal(logits_of(LLaDAModelLM.from_pretrained(tmp_path), tokens), logits_of(merged, tokens))
    with pytest.raises(ValueError, match="attn_out"):
        get_peft_model(tiny_llada(), LoraConfig(target_modules=["attn_out"]))


def test_gradient_checkpointing_changes_nothing() -> None:
    tokens = torch.randint(3, 100, (2, 9))
    gradients = []
    for enable in (False, True):
        model = tiny_llada().train()
        if enable:
            model.gradient_checkpointing_enable()
        model(input_ids=tokens, target_ids=tokens, target_mask=tokens > 50).token_nll.sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients)


def test_four_bit_checkpoint_keeps_original_names(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llada(d_model=64, mlp_hidden_size=128).save_pretrained(tmp_path / "full")
    quantised = LLaDAModelLM.from_pretrained(
        tmp_path / "full", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    quantised.save_pretrained(tmp_path / "nf4")  # before any forward: bitsandbytes repacks the weights on CPU
    assert "model.transformer.blocks.0.ff_proj.weight.absmax" in saved_keys(tmp_path / "nf4")
    tokens = torch.randint(3, 100, (1, 9))
    reloaded = LLaDAModelLM.from_pretrained(tmp_path / "nf4")
    assert torch.equal(logits_of(reloaded, tokens), logits_of(quantised, tokens))


def test_forward_leaves_nothing_in_the_config(tmp_path: Path) -> None:
    model = LLaDAModelLM.from_pretrained(FIXTURE, dtype=torch.float32)
    before = model.config.to_dict()
    logits_of(model, torch.randint(3, 100, (1, 4)))
    assert model.config.to_dict() == before
    assert not {"is_causal", "rope_parameters", "pretraining_tp", "hidden_size", "logits_shift"} & before.keys()
    assert model.config.is_causal is False
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert model.config.to_dict() == before


def test_config_accepts_llama_names_and_writes_original_ones() -> None:
    config = LLaDAConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    assert (config.d_model, config.n_layers, config.n_heads, config.n_kv_heads) == (64, 3, 4, 2)
    written = json.loads(config.to_json_string())
    assert (written["d_model"], written["n_layers"], written["n_kv_heads"]) == (64, 3, 2)
    assert "hidden_size" not in written
    assert set(config_json(FIXTURE)) - {"architectures", "auto_map"} <= set(written)
    assert written["use_cache"] is False


def test_mask_token_default_belongs_to_the_published_vocabulary() -> None:
    assert LLaDAConfig().mask_token_id == 126336
    assert LLaDAConfig(vocab_size=512).mask_token_id is None


def test_changed_keys_are_written_and_nulls_kept(tmp_path: Path) -> None:
    source = config_json(FIXTURE) | {"n_kv_heads": None, "note": "ours", "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(source | {"transformers_version": "4.46.3"}))
    config = AutoConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "same")
    assert config_json(tmp_path / "same") == source
    config.mask_token_id, config.logits_shift, config.dtype = 7, True, torch.float32
    config.save_pretrained(tmp_path / "changed")
    changed = {"mask_token_id": 7, "logits_shift": True, "torch_dtype": "float32"}
    assert config_json(tmp_path / "changed") == source | changed
    assert AutoConfig.from_pretrained(tmp_path / "changed").logits_shift is True


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True),
        ("block_group_size", 2),
        ("attention_layer_norm", True),
        ("block_type", "sequential"),
        ("activation_type", "swiglu"),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("bias_for_layer_norm", True),
        ("include_bias", True),
        ("rope", False),
        ("rope_full_precision", False),
        ("scale_logits", True),
        ("input_emb_norm", True),
        ("residual_dropout", 0.1),
        ("embedding_dropout", 0.1),
    ],
)
def test_unrepresentable_structure_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{key}={value!r}.*supported: .*config\.json"):
        LLaDAConfig(**{key: value})


def test_all_structural_faults_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"block_type='sequential'.*alibi=True.*rope_scaling=.*n_kv_heads=3"):
        LLaDAConfig(
            block_type="sequential", alibi=True, n_kv_heads=3, rope_scaling={"rope_type": "linear", "factor": 2.0}
        )
    with pytest.raises(ValueError, match=r"embedding_size=100 .*vocab_size=128"):
        LLaDAConfig(vocab_size=128, embedding_size=100)


@pytest.mark.parametrize("key", ["rope", "block_type", "weight_tying"])
def test_missing_structural_key_is_refused(key: str, tmp_path: Path) -> None:
    shutil.copy(FIXTURE / "config.json", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content[key]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"lacks {key}\..*Add the keys"):
        AutoConfig.from_pretrained(tmp_path)


def test_safetensors_metadata_says_pytorch(tmp_path: Path) -> None:
    """The authors' loader refuses files without it."""
    tiny_llada().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
