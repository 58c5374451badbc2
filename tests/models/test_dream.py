"""Dream: parity with the authors' code, config.json that their code can read, and the logits shift."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dlm_tune.models import DreamConfig, DreamModel
from tests.models.layouts import config_json, logits_of, saved_keys
from tests.tiny_models import tiny_dream

FIXTURE = Path(__file__).parents[1] / "fixtures" / "dream_tiny_ref"


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 0.0), ("eager", 1e-5)])
def test_logits_equal_the_reference(attention: str, tolerance: float) -> None:
    model = DreamModel.from_pretrained(FIXTURE, dtype=torch.float32, attn_implementation=attention)
    reference = load_file(FIXTURE / "reference.safetensors")
    logits = logits_of(model, reference["input_ids"], reference["attention_mask"])
    assert (logits - reference["logits"]).abs().max() <= tolerance
    real = reference["padded_attention_mask"].bool()
    padded = logits_of(model, reference["padded_input_ids"], reference["padded_attention_mask"])
    assert (padded - reference["padded_logits"])[real].abs().max() <= tolerance


def test_save_returns_the_original_files(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32).save_pretrained(tmp_path)
    original, saved = load_file(FIXTURE / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[key], saved[key]) for key in original)
    assert config_json(tmp_path) == config_json(FIXTURE)


VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "theta_eps": {"rope_theta": 10000.0, "rms_norm_eps": 1e-3},
    "mha": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 1},
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_variants_equal_qwen2_and_survive_a_round_trip(overrides: dict, tmp_path: Path) -> None:
    model = tiny_dream(**overrides)
    config = model.config
    qwen2 = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": overrides.get("rope_theta", 1000000.0)},
            tie_word_embeddings=config.tie_word_embeddings,
            is_causal=False,
        )
    ).eval()
    qwen2.load_state_dict(model.state_dict())
    tokens = torch.randint(3, 100, (2, 9))
    assert torch.equal(logits_of(model, tokens), logits_of(qwen2, tokens))

    model.save_pretrained(tmp_path / "first")
    loaded = AutoModel.from_pretrained(tmp_path / "first")
    assert type(loaded) is DreamModel
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    loaded.save_pretrained(tmp_path / "second")
    assert config_json(tmp_path / "second") == config_json(tmp_path / "first")
    assert saved_keys(tmp_path / "second") == saved_keys(tmp_path / "first")


def test_saved_config_has_the_keys_the_authors_code_reads(tmp_path: Path) -> None:
    tiny_dream(rope_theta=12345.0).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["rope_theta"] == 12345.0
    assert content["rope_scaling"] is None
    assert content["torch_dtype"] == "float32"
    assert content["architectures"] == ["DreamModel"]
    assert content["use_cache"] is False
    assert not {"rope_parameters", "layer_types", "dtype", "is_causal", "logits_shift"} & content.keys()
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 12345.0


def test_scaled_rotary_settings_survive(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    model = tiny_dream(rope_scaling=dict(scaling))
    tokens = torch.randint(3, 100, (1, 9))
    assert not torch.equal(logits_of(model, tokens), logits_of(tiny_dream(), tokens))
    model.save_pretrained(tmp_path)
    assert config_json(tmp_path)["rope_scaling"] == scaling
    assert config_json(tmp_path)["rope_theta"] == 1000000.0
    assert torch.equal(logits_of(DreamModel.from_pretrained(tmp_path), tokens), logits_of(model, tokens))


def test_dtype_is_written_as_torch_dtype(tmp_path: Path) -> None:
    DreamModel.from_pretrained(FIXTURE, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert config_json(tmp_path) == config_json(FIXTURE) | {"torch_dtype": "bfloat16"}


def test_sliding_window_of_an_unused_window_is_kept(tmp_path: Path) -> None:
    source = config_json(FIXTURE) | {"sliding_window": 4096}
    (tmp_path / "config.json").write_text(json.dumps(source))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert config_json(tmp_path / "saved") == source


def test_shift_follows_the_architecture_and_survives_saving(tmp_path: Path) -> None:
    assert DreamModel.from_pretrained(FIXTURE).config.logits_shift is True
    reasoner = config_json(FIXTURE) | {"architectures": ["DreamForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(reasoner))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.logits_shift is False
    model = DreamModel(config)
    model.save_pretrained(tmp_path / "saved")
    assert config_json(tmp_path / "saved") == reasoner
    assert model.config.logits_shift is False
    assert AutoConfig.from_pretrained(tmp_path / "saved").logits_shift is False


def test_shift_set_by_hand_is_written_only_where_it_differs(tmp_path: Path) -> None:
    unshifted = tiny_dream(logits_shift=False)
    unshifted.save_pretrained(tmp_path / "unshifted")
    assert config_json(tmp_path / "unshifted")["logits_shift"] is False
    assert AutoConfig.from_pretrained(tmp_path / "unshifted").logits_shift is False
    config = AutoConfig.from_pretrained(tmp_path / "unshifted", logits_shift=True)
    assert config.logits_shift is True
    config.save_pretrained(tmp_path / "shifted")
    assert "logits_shift" not in config_json(tmp_path / "shifted")


@pytest.mark.parametrize("key", ["use_mrope", "use_sliding_window"])
def test_unrepresentable_settings_are_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}=True .*supported: false.*config\.json"):
        DreamConfig(**{key: True})
