"""Every family loads as a bidirectional diffusion model, and every damaged checkpoint says what is wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, Qwen2ForCausalLM

from dlm_tune.models import FAMILIES, DiffusionMixin, DreamModel, LLaDAModelLM, load_model
from tests.models.layouts import config_json, logits_of, saved_keys
from tests.tiny_models import save_tiny_checkpoint, tiny_llada, tiny_tokenizer

DECODERS = sorted(FAMILIES.keys() - {"llada", "Dream"})


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes a key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def save_decoder(directory: Path, model_type: str, **config: Any) -> Path:
    """A causal decoder as its authors publish it, with a tokenizer that has a mask token."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 128,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(settings | config))).save_pretrained(
        directory
    )
    tiny_tokenizer("llada").save_pretrained(directory)
    return directory


@pytest.fixture
def llada(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "llada", "llada")


@pytest.mark.parametrize(("family", "model_class"), [("llada", LLaDAModelLM), ("Dream", DreamModel)])
def test_family_is_detected(family: str, model_class: type, tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tmp_path, family)
    model = load_model(directory)
    assert type(model) is model_class
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.mask_token_id == 2
    assert model.config.logits_shift is (family == "Dream")
    assert model.name_or_path == str(directory)
    assert load_model(directory, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(directory, dtype="float16").dtype == torch.float16


@pytest.mark.parametrize("model_type", DECODERS)
def test_causal_decoder_becomes_bidirectional(model_type: str, tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "causal", model_type)
    tokens = torch.randint(3, 100, (1, 6))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 100
    causal = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert torch.equal(logits_of(causal, tokens)[:, 0], logits_of(causal, changed)[:, 0])

    for attention in ("sdpa", "eager"):
        model = load_model(directory, attn_implementation=attention)
        assert isinstance(model, DiffusionMixin)
        assert not torch.equal(logits_of(model, tokens)[:, 0], logits_of(model, changed)[:, 0])
    assert type(model).__name__ == type(causal).__name__
    assert (model.config.mask_token_id, model.config.logits_shift) == (2, False)

    model.config.logits_shift = True
    model.save_pretrained(tmp_path / "saved")
    content = config_json(tmp_path / "saved")
    assert (content["is_causal"], content["mask_token_id"], content["logits_shift"]) == (False, 2, True)
    assert content["architectures"] == config_json(directory)["architectures"]
    again = load_model(tmp_path / "saved", attn_implementation="eager")
    assert again.config.logits_shift is True
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


def test_decoder_classes_are_stable_and_leave_transformers_alone(tmp_path: Path) -> None:
    directory = save_decoder(tmp_path, "qwen2")
    assert type(load_model(directory)) is type(load_model(directory))
    assert isinstance(load_model(directory), Qwen2ForCausalLM)
    assert not issubclass(Qwen2ForCausalLM, DiffusionMixin)
    assert not issubclass(LlamaForCausalLM, DiffusionMixin)


def test_mask_token_comes_from_the_tokenizer_where_the_config_has_none(llada: Path) -> None:
    edit_json(llada / "config.json", mask_token_id=None)
    assert load_model(llada).config.mask_token_id == 2
    # The published LLaDA tokenizer names no mask token, but its vocabulary has the family's.
    edit_json(llada / "tokenizer_config.json", mask_token=None)
    assert load_model(llada).config.mask_token_id == 2


@pytest.mark.parametrize("model_type", ["llada", "Dream", "qwen2"])
def test_missing_mask_token_is_an_error_with_the_remedy(model_type: str, tmp_path: Path) -> None:
    if model_type == "qwen2":
        save_decoder(tmp_path, "qwen2")
    else:
        save_tiny_checkpoint(tmp_path, model_type, mask_token_id=None)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no mask token.*mask_token_id.*config\.json.*mask_token.*tokenizer_config"):
        load_model(tmp_path)


@pytest.mark.parametrize("mask_token_id", [128, -1])
def test_mask_token_outside_the_embeddings_is_refused(llada: Path, mask_token_id: int) -> None:
    edit_json(llada / "config.json", mask_token_id=mask_token_id)
    with pytest.raises(ValueError, match=rf"mask_token_id={mask_token_id} is outside the model's 128 embedding rows"):
        load_model(llada)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llada2_moe", "attends block by block"),
        ("lladamoe", "mixture-of-experts"),
        ("mamba", "left to right"),
        ("gpt2", "not known to work in both directions"),
        (None, "not known"),
    ],
)
def test_unsupported_model_type_is_refused(llada: Path, model_type: str | None, reason: str) -> None:
    edit_json(llada / "config.json", model_type=model_type)
    with pytest.raises(ValueError, match=rf"model_type={model_type!r} .*{reason}.*Supported: llada, Dream"):
        load_model(llada)


def test_sliding_window_is_refused(tmp_path: Path) -> None:
    save_decoder(tmp_path / "mistral", "mistral", sliding_window=16)
    with pytest.raises(ValueError, match=r"sliding_window=16 .*null"):
        load_model(tmp_path / "mistral")
    save_decoder(tmp_path / "qwen2", "qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ValueError, match=r"sliding_window=16"):
        load_model(tmp_path / "qwen2")


def test_unsupported_structure_names_the_file(llada: Path) -> None:
    edit_json(llada / "config.json", alibi=True)
    with pytest.raises(ValueError, match=r"config\.json: .*alibi=True"):
        load_model(llada)


def test_missing_path_names_the_nearest_directories(llada: Path) -> None:
    with pytest.raises(ValueError, match=r"llaada' does not exist; the nearest directories in .* are llada\."):
        load_model(llada.parent / "llaada")
    with pytest.raises(ValueError, match=r"does not exist; .* holds llada\."):
        load_model(llada.parent / "nowhere" / "deeper" / "model")
    with pytest.raises(ValueError, match="is a file; give the directory"):
        load_model(llada / "config.json")


def test_hub_name_that_cannot_be_fetched_is_explained() -> None:
    with pytest.raises(
        ValueError, match=r"'no-such-organisation/no-such-model' is not a local directory.*HF_HUB_OFFLINE"
    ):
        load_model("no-such-organisation/no-such-model")


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llada",')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="list instead of an object"):
        load_model(tmp_path)


@pytest.mark.parametrize("kept", [100, 0, -1])
def test_truncated_weights(llada: Path, kept: int) -> None:
    file = llada / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors \(\d+ bytes\) is truncated or corrupt.*again"):
        load_model(llada)


def test_missing_shard(tmp_path: Path) -> None:
    tiny_llada().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of the {len(shards)} weight files.*{shards[1].name}"):
        load_model(tmp_path)


def test_no_weights_and_pickled_weights(llada: Path) -> None:
    weights = load_file(llada / "model.safetensors")
    (llada / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors.*it holds .*config\.json"):
        load_model(llada)
    torch.save(weights, llada / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickle files can run code.*safetensors"):
        load_model(llada)


def test_missing_and_unexpected_weights_are_errors(llada: Path) -> None:
    weights = load_file(llada / "model.safetensors")
    weights["model.transformer.blocks.0.q_norm.weight"] = torch.ones(32)
    del weights["model.transformer.ln_f.weight"]
    save_file(weights, llada / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing .*model\.norm.* and 1 weights are unknown .*q_norm"):
        load_model(llada)


def test_weights_of_another_shape_are_an_error(llada: Path) -> None:
    edit_json(llada / "config.json", mlp_hidden_size=32)
    with pytest.raises(
        ValueError, match=r"6 weights have another shape \(.*down_proj\.weight is \[32, 64\] instead of \[32, 32\]"
    ):
        load_model(llada)


def test_redundant_weights_are_not_errors(tmp_path: Path) -> None:
    """A tied model's second table, and the rotary frequencies that old Llama files carry."""
    tied = save_tiny_checkpoint(tmp_path / "tied", "llada", weight_tying=True)
    weights = load_file(tied / "model.safetensors")
    weights["model.transformer.ff_out.weight"] = weights["model.transformer.wte.weight"].clone()
    save_file(weights, tied / "model.safetensors", {"format": "pt"})
    model = load_model(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    llama = save_decoder(tmp_path / "llama", "llama")
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    assert load_model(llama).config.mask_token_id == 2


def test_quantised_checkpoint_loads_as_it_was_saved(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    full = save_tiny_checkpoint(tmp_path / "full", "llada", d_model=64, mlp_hidden_size=128)
    quantised = load_model(full, quantization="4bit")
    quantised.save_pretrained(tmp_path / "nf4")  # before any forward: bitsandbytes repacks the weights on CPU
    tokens = torch.randint(3, 100, (1, 9))
    assert torch.equal(logits_of(load_model(tmp_path / "nf4"), tokens), logits_of(quantised, tokens))


@pytest.mark.parametrize("setting", [{"dtype": "float31"}, {"dtype": "int8"}, {"quantization": "2bit"}])
def test_unknown_settings_name_the_choices(llada: Path, setting: dict) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{name}='{value}' .*use "):
        load_model(llada, **setting)


@pytest.mark.parametrize("quantization", ["4bit", "8bit", BitsAndBytesConfig(load_in_4bit=True)])
def test_quantisation(quantization: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    save_tiny_checkpoint(tmp_path, "llada", d_model=64, mlp_hidden_size=128)
    tokens = torch.randint(3, 100, (1, 9))
    exact = logits_of(load_model(tmp_path), tokens)
    model = load_model(tmp_path, quantization=quantization)
    assert type(model.model.layers[0].mlp.gate_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    assert type(model.lm_head) is torch.nn.Linear
    logits = logits_of(model, tokens).float()
    correlation = torch.corrcoef(torch.stack([logits.flatten(), exact.flatten()]))[0, 1]
    assert 0.7 < correlation < 1 - 1e-6


def save_adapter(base: Path, directory: Path, **lora: Any) -> tuple[Path, PeftModel]:
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | lora
    model = get_peft_model(load_model(base), LoraConfig(**settings, task_type="CAUSAL_LM"))
    model.save_pretrained(directory)
    return directory, model


def test_adapter_loads_by_argument_and_by_its_own_directory(llada: Path, tmp_path: Path) -> None:
    adapter, trained = save_adapter(llada, tmp_path / "adapter")
    tokens = torch.randint(3, 100, (1, 9))
    expected = logits_of(trained, tokens)
    assert not torch.equal(expected, logits_of(load_model(llada), tokens))
    for model in (load_model(llada, adapter=adapter), load_model(adapter)):
        assert isinstance(model, PeftModel)
        assert isinstance(model.get_base_model(), DiffusionMixin)
        assert torch.equal(logits_of(model, tokens), expected)
    with pytest.raises(ValueError, match="is itself an adapter"):
        load_model(adapter, adapter=adapter)


def test_adapter_of_another_model_is_refused(llada: Path, tmp_path: Path) -> None:
    adapter, _ = save_adapter(llada, tmp_path / "adapter")
    wider = save_tiny_checkpoint(tmp_path / "wider", "llada", d_model=48, n_heads=4)
    with pytest.raises(
        ValueError, match=rf"{adapter}.*trained on .*{llada}.*does not fit the model .*wider.*size mismatch"
    ):
        load_model(wider, adapter=adapter)
    shallower = save_tiny_checkpoint(tmp_path / "shallower", "llada", n_layers=1)
    with pytest.raises(ValueError, match=r"does not fit the model .*shallower.*no counterpart \(.*layers\.1\."):
        load_model(shallower, adapter=adapter)
    deeper = save_tiny_checkpoint(tmp_path / "deeper", "llada", n_layers=3)
    with pytest.raises(ValueError, match=r"does not fit the model .*deeper.*layers\.2\."):
        load_model(deeper, adapter=adapter)


def test_damaged_adapters_are_refused(llada: Path, tmp_path: Path) -> None:
    adapter, _ = save_adapter(llada, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter=.* has no adapter_config\.json"):
        load_model(llada, adapter=llada)
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(weights[:50])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors \(50 bytes\) is truncated"):
        load_model(llada, adapter=adapter)
    shutil.rmtree(llada)
    with pytest.raises(ValueError, match=r"is an adapter of base_model_name_or_path=.*load_model\(BASE, adapter="):
        load_model(adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"names no base_model_name_or_path"):
        load_model(adapter)


def test_merged_adapter_is_saved_in_the_original_layout(llada: Path, tmp_path: Path) -> None:
    adapter, trained = save_adapter(llada, tmp_path / "adapter")
    tokens = torch.randint(3, 100, (1, 9))
    expected = logits_of(trained, tokens)
    load_model(adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert saved_keys(tmp_path / "merged") == saved_keys(llada)
    assert config_json(tmp_path / "merged") == config_json(llada)
    assert (logits_of(load_model(tmp_path / "merged"), tokens) - expected).abs().max() < 1e-4
