"""Layers of new adapters, adapters on the model they belong to, several on one base."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from dlm_tune.models import load_model, load_tokenizer, write_adapter_facts
from dlm_tune.models.adapter_facts import read_adapter_facts
from dlm_tune.models.adapters import complete_peft_config
from dlm_tune.models.families import FAMILIES
from tests.models.test_loading import edit_json, logits_of, save_decoder
from tests.tiny_models import MASK_ID, save_tiny_checkpoint, tiny_dream, tiny_llada

TOKENS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
LINEAR_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base"), "llada")


def save_adapter(base: Path, directory: Path, seed: int = 0, **settings: Any) -> torch.Tensor:
    """Save a random adapter with its facts; its logits."""
    model = load_model(base)
    config = complete_peft_config(LoraConfig(r=2, init_lora_weights=False, **settings), model)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(directory)
    write_adapter_facts(directory, model.config)
    return logits_of(adapted, TOKENS)


# Layers of a new adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_by_default_are_the_familys(family: str, tmp_path: Path) -> None:
    is_native = family in ("llada", "Dream")
    model = {"llada": tiny_llada, "Dream": tiny_dream}[family]() if is_native else load_model(
        save_decoder(tmp_path, family)
    )  # fmt: skip
    config = LoraConfig()
    assert complete_peft_config(config, model).target_modules == LINEAR_LAYERS
    assert config.target_modules is None, "the caller's own is left as it is"


@pytest.mark.parametrize("target", ["all-linear", None])
def test_the_head_is_not_adapted_unless_it_is_named(target: str | None) -> None:
    model = tiny_llada()
    adapted = get_peft_model(model, complete_peft_config(LoraConfig(target_modules=target), model))
    layers = {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(layers) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in layers)
    model = tiny_llada()
    adapted = get_peft_model(model, complete_peft_config(LoraConfig(target_modules=["lm_head"]), model))
    assert {name for name, _ in adapted.named_parameters() if "lora_A" in name} == {
        "base_model.model.lm_head.lora_A.default.weight"
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_proj", "attn_out", "ff_proj"]}, ["attn_out -> o_proj", "ff_proj -> gate_proj"]),
        ({"target_modules": ["transformer.blocks.0.ff_out"]}, ["ff_out -> down_proj", "lm_head"]),
        ({"target_modules": ["wte"]}, ["wte -> embed_tokens"]),
        ({"modules_to_save": ["wte"]}, ["modules_to_save", "lora_modules_to_save", "wte -> embed_tokens"]),
        ({"target_modules": ["q_proj", "query"]}, ["'query'", "none", "down_proj, embed_tokens, gate_proj"]),
        ({"target_modules": "query"}, ["'query'", "lm_head, o_proj, q_proj"]),
        ({"target_modules": r".*\.(query|key)"}, ["of which the model LLaDAModelLM has none"]),
        ({"modules_to_save": ["classifier"]}, ["'classifier'", "input_layernorm", "lm_head"]),
    ],
)
def test_names_of_no_layer_are_refused(settings: dict[str, Any], words: list[str]) -> None:
    """PEFT alone takes the first, and adapts q_proj only."""
    with pytest.raises(ValueError, match=r"target_modules|modules_to_save") as error:
        complete_peft_config(LoraConfig(**settings), tiny_llada())
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "value", ["q_proj", ["q_proj"], r"model\.layers\.\d+\.self_attn\.q_proj", ["self_attn.q_proj"]]
)
def test_names_and_patterns_of_layers_are_taken(value: Any) -> None:
    """TRL makes a string of a list of one name, which PEFT would read as a pattern that matches nothing."""
    model = tiny_llada()
    adapted = get_peft_model(model, complete_peft_config(LoraConfig(target_modules=value), model))
    names = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert names == {"q_proj"}


# Facts: the model that an adapter belongs to


def test_facts_name_the_model(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path)
    assert read_adapter_facts(tmp_path) == {
        "model_type": "llada",
        "mask_token_id": MASK_ID,
        "logits_shift": False,
        "embedding_rows": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"d_model": 48}, "hidden_size is 32 in the adapter and 48 in the model"),
        ({"n_layers": 1}, "num_hidden_layers is 2 in the adapter and 1 in the model"),
        ({"n_layers": 3}, "num_hidden_layers is 2 in the adapter and 3 in the model"),
        ({"n_heads": 2, "n_kv_heads": 2}, "num_attention_heads is 4 in the adapter and 2 in the model"),
        ({"mlp_hidden_size": 96}, "intermediate_size is 64 in the adapter and 96 in the model"),
        ({"vocab_size": 130, "embedding_size": 130}, "embedding_rows is 128 in the adapter and 130 in the model"),
        ({"mask_token_id": 5}, "mask_token_id is 2 in the adapter and 5 in the model"),
        ({"family": "Dream"}, "model_type is 'llada' in the adapter and 'Dream' in the model; logits_shift is False"),
    ],
)
def test_the_wrong_base_is_refused_by_name_and_shape(
    base: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder, other: dict[str, Any], words: str
) -> None:
    save_adapter(base, tmp_path / "adapter")
    recwarn.clear()
    wrong = save_tiny_checkpoint(tmp_path / "wrong", other.pop("family", "llada"), **other)
    if "mask_token_id" in other:
        for file in wrong.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(ValueError, match=r"trained on .*base.* does not fit the model .*wrong") as error:
        load_model(wrong, adapter=tmp_path / "adapter")
    assert words in str(error.value)
    assert not [warning for warning in recwarn if "adapter" in str(warning.message)], "said before PEFT warns"


def test_another_checkpoint_of_the_same_shape_is_a_warning(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be the same one in a folder that was renamed."""
    expected = save_adapter(base, tmp_path / "adapter")
    moved = tmp_path / "moved"
    moved.symlink_to(base)
    with caplog.at_level(logging.WARNING, logger="dlm_tune"):
        assert torch.equal(logits_of(load_model(moved, adapter=tmp_path / "adapter"), TOKENS), expected)
        assert not caplog.records, "a link to the same place"
        sibling = save_tiny_checkpoint(tmp_path / "sibling", "llada", seed=1)
        model = load_model(sibling, adapter=tmp_path / "adapter")
    (record,) = caplog.records
    assert f"was trained on {base} and is put on {sibling}" in record.getMessage()
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(sibling), "what it lies on now"


def test_adapters_without_facts_load(base: Path, tmp_path: Path) -> None:
    expected = save_adapter(base, tmp_path)
    edit_json(tmp_path / "adapter_config.json", auto_mapping=None)
    assert torch.equal(logits_of(load_model(tmp_path), TOKENS), expected)


def test_tables_of_another_size_are_refused_without_facts_too(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    edit_json(tmp_path / "adapter" / "adapter_config.json", auto_mapping=None)
    larger = save_tiny_checkpoint(tmp_path / "larger", "llada", vocab_size=130, embedding_size=130)
    with pytest.raises(ValueError, match=r"does not fit the model .*size mismatch for .*embed_tokens"):
        load_model(larger, adapter=tmp_path / "adapter")


def test_trained_tokens_behind_the_table_are_refused_without_facts_too(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter", trainable_token_indices=[2, 120])
    edit_json(tmp_path / "adapter" / "adapter_config.json", auto_mapping=None)
    smaller = save_tiny_checkpoint(tmp_path / "smaller", "llada", vocab_size=110, embedding_size=110)
    with pytest.raises(ValueError, match=r"does not fit the model .*smaller.*: index 120 is out of bounds"):
        load_model(smaller, adapter=tmp_path / "adapter")


def test_a_vocabulary_larger_than_the_table_is_refused(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tmp_path, "llada", vocab_size=64, embedding_size=64)
    with pytest.raises(ValueError, match=r"ids up to 10\d but the model has 64 embedding rows"):
        load_tokenizer(directory)


def test_the_revision_of_the_base_is_kept(base: Path, tmp_path: Path) -> None:
    model = load_model(base, revision="v1.0")  # without effect on a folder, but what the user said
    config = complete_peft_config(LoraConfig(), model)
    assert config.revision == "v1.0"
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v1.0"
    loaded = load_model(tmp_path)
    assert loaded.get_base_model().base_revision == "v1.0"


# Adapters that are loaded


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}],
    ids=["lora", "dora", "rslora", "modules_to_save"],
)
def test_adapters_reload_and_are_switched_off_bit_by_bit(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = save_adapter(base, tmp_path, **settings)
    model = load_model(tmp_path)
    assert torch.equal(logits_of(model, TOKENS), expected)
    untouched = logits_of(load_model(base), TOKENS)
    assert not torch.allclose(expected, untouched, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, TOKENS), untouched)
    assert torch.equal(logits_of(model, TOKENS), expected)
    if "modules_to_save" in settings:
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} <= set(saved)


def test_several_adapters_on_one_base(base: Path, tmp_path: Path) -> None:
    logits = {
        "plain": save_adapter(base, tmp_path / "plain", seed=1),
        "dora": save_adapter(base, tmp_path / "dora", seed=2, use_dora=True, target_modules=["q_proj"]),
    }
    model = load_model(base, adapter={name: tmp_path / name for name in logits})
    assert isinstance(model, PeftModel)
    assert torch.equal(logits_of(model, TOKENS), logits["plain"]), "the first is active"
    for name in ("dora", "plain"):
        model.set_adapter(name)
        assert torch.equal(logits_of(model, TOKENS), logits[name])
    assert not any(p.requires_grad for p in load_model(base, adapter={"plain": tmp_path / "plain"}).parameters())


def test_several_adapters_that_do_not_go_together(base: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_adapter(base, tmp_path / name)
    both = {"a": tmp_path / "a", "b": tmp_path / "b"}
    with pytest.raises(ValueError, match=r"is_trainable=True with the adapters a, b: one is trained"):
        load_model(base, adapter=both, is_trainable=True)
    with pytest.raises(ValueError, match=r"names no adapter"):
        load_model(base, adapter={})
    settings = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    settings["auto_mapping"]["dlm_tune"]["guidance_distillation_scale"] = 2.0
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"'a' \(no guidance\) and 'b' \({'guidance_distillation_scale': 2.0}\)"):
        load_model(base, adapter=both)
    settings["auto_mapping"]["dlm_tune"]["hidden_size"] = 64
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"/b'.* hidden_size is 64 in the adapter"):
        load_model(base, adapter=both)


def test_training_goes_on_only_where_it_is_asked_for(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path, modules_to_save=["lm_head"])
    frozen, trainable = load_model(tmp_path), load_model(tmp_path, is_trainable=True)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trained = [name for name, parameter in trainable.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2 + 1
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
