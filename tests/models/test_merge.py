"""Merged checkpoints: the logits are those of the adapter on its base, the files those of the base's layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlm_tune.models import load_model, load_tokenizer, merge_adapter, write_adapter_facts
from dlm_tune.models.convert import convert_checkpoint
from tests.models.layouts import config_json, logits_of, saved_keys
from tests.tiny_models import save_tiny_checkpoint, tiny_tokenizer

INPUTS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(5))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORAS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": LINEAR},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_alpha": 7},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 5},
        "alpha_pattern": {"down_proj": 11},
    },
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [2, 7, 9]}},
    "norms": {"target_modules": ["k_proj"], "modules_to_save": ["norm", "input_layernorm"]},
}
BIASES: dict[str, dict[str, Any]] = {"biases": {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True}}
TIED: dict[str, dict[str, Any]] = {
    "together": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "table": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "saved-table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
FIXTURES = Path(__file__).parents[1] / "fixtures"


def make_adapter(base: Path, directory: Path, config: Any, *, seed: int = 1, dtype: Any = torch.float32) -> Path:
    """Save an adapter on a checkpoint, its weights drawn so that all of them matter."""
    model = load_model(base, dtype="float32")
    peft_model = get_peft_model(model, config)
    randomise(peft_model, seed)
    peft_model.to(dtype).save_pretrained(directory)
    write_adapter_facts(directory, model.config)
    return directory


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, **({"lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings))


def adapted_logits(base: Path, adapter: Path, **settings: Any) -> Tensor:
    return logits_of(load_model(base, dtype="float32", adapter=adapter, **settings), INPUTS)


def check_merge(base: Path, adapter: Path, output: Path, **settings: Any) -> Tensor:
    """Merge, load, and compare with adapter on base."""
    expected = adapted_logits(base, adapter)
    assert (expected - logits_of(load_model(base, dtype="float32"), INPUTS)).abs().max() > 0.01
    merge_adapter(adapter, output, base=base, **settings)
    merged = logits_of(load_model(output, dtype="float32"), INPUTS)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    return merged


@pytest.fixture(scope="module")
def bases(tmp_path_factory: Any) -> dict[str, Path]:
    """A base of each kind of layout: one file, shards, tied tables, and a converted causal decoder."""
    folder = tmp_path_factory.mktemp("bases")
    found = {
        "llada": save_tiny_checkpoint(folder / "llada"),
        "llada-tied": save_tiny_checkpoint(folder / "llada-tied", weight_tying=True),
        "Dream": save_tiny_checkpoint(folder / "Dream", "Dream"),
    }
    load_model(found["Dream"]).save_pretrained(found["Dream"], max_shard_size="30KB")
    found["qwen3"] = tiny_qwen3(folder)
    return found


def tiny_qwen3(folder: Path) -> Path:
    """A converted Qwen3 with tied tables."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "causal")
    tokenizer = tiny_tokenizer("Dream")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder / "causal")
    convert_checkpoint(folder / "causal", folder / "qwen3", mask_token="<|dlm_mask|>")
    return folder / "qwen3"


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("llada", kind) for kind in LORAS), *(("Dream", kind) for kind in ("lora", "dora", "biases"))],
)
def test_merged_logits_are_those_of_the_adapter_on_its_base(
    bases: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    settings = (LORAS | BIASES)[kind]
    adapter = make_adapter(bases[family], tmp_path / "adapter", lora(**settings))
    check_merge(bases[family], adapter, tmp_path / "merged")
    assert saved_keys(tmp_path / "merged") == saved_keys(bases[family])
    assert config_json(tmp_path / "merged") == config_json(bases[family])


@pytest.mark.parametrize(
    ("kind", "stays_tied"),
    [
        *(("dora", True), ("together", True), ("tokens", None), ("saved", False), ("table", False), ("head", False)),
        *(("saved-table", False), ("saved-head", False)),  # the other one stays the base's
    ],
)
@pytest.mark.parametrize("family", ["llada-tied", "qwen3"])
def test_tied_tables_stay_tied_only_if_the_adapter_leaves_them_equal(
    bases: dict[str, Path], tmp_path: Path, family: str, kind: str, stays_tied: bool | None
) -> None:
    settings = (LORAS | TIED)[kind]
    adapter = make_adapter(bases[family], tmp_path / "adapter", lora(**settings))
    check_merge(bases[family], adapter, tmp_path / "merged")
    if stays_tied is None:  # PEFT ties trained tokens too where it finds `tie_word_embeddings` in config.json
        stays_tied = family == "qwen3"
    config = load_model(tmp_path / "merged").config
    assert config.tie_word_embeddings is stays_tied
    assert len(saved_keys(tmp_path / "merged")) == len(saved_keys(bases[family])) + (not stays_tied)


@pytest.mark.parametrize("method", ["pissa", "loha", "ia3"])
def test_adapters_that_are_not_merged_by_layer(bases: dict[str, Path], tmp_path: Path, method: str) -> None:
    config = {
        "pissa": lora(target_modules=LINEAR, init_lora_weights="pissa"),
        "loha": LoHaConfig(r=4, alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM"),
        "ia3": IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    }[method]
    adapter = make_adapter(bases["llada"], tmp_path / "adapter", config)
    check_merge(bases["llada"], adapter, tmp_path / "merged")
    assert saved_keys(tmp_path / "merged") == saved_keys(bases["llada"])


@pytest.fixture(scope="module")
def plain(bases: dict[str, Path], tmp_path_factory: Any) -> tuple[Path, Path]:
    """The LLaDA base, and a LoRA of all its linear layers."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    return bases["llada"], make_adapter(bases["llada"], folder, lora(target_modules=LINEAR))


def test_other_types_are_the_float32_merge_rounded_once(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    merge_adapter(adapter, tmp_path / "exact", base=base)
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    for name in ("bfloat16", "float16"):
        result = merge_adapter(adapter, tmp_path / name, base=base, dtype=name)
        rounded = load_file(tmp_path / name / "model.safetensors")
        assert result.dtype == getattr(torch, name)
        assert all(torch.equal(rounded[key], tensor.to(result.dtype)) for key, tensor in exact.items())
        assert load_model(tmp_path / name, dtype="auto").dtype == result.dtype
    load_model(base, dtype="bfloat16").save_pretrained(tmp_path / "half")
    half = merge_adapter(adapter, tmp_path / "from-half", base=tmp_path / "half")
    assert half.dtype == torch.bfloat16  # the base's own


def test_the_type_is_that_of_most_weights(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Not of the first in the file, to which all others would be rounded."""
    base, adapter = plain
    for majority, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        mixed = shutil.copytree(base, tmp_path / f"base-{majority}")
        tensors = load_file(base / "model.safetensors")
        first = min(tensors)
        converted = {name: tensor.to(other if name == first else majority) for name, tensor in tensors.items()}
        save_file(converted, mixed / "model.safetensors", {"format": "pt"})
        assert merge_adapter(adapter, tmp_path / f"merged-{majority}", base=mixed).dtype == majority


def test_files_are_cut_at_max_shard_size(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    one = merge_adapter(adapter, tmp_path / "one", base=base)
    many = merge_adapter(adapter, tmp_path / "many", base=base, max_shard_size="20KB")
    assert one.num_files == 1
    assert many.num_files == len(list((tmp_path / "many").glob("model-*.safetensors"))) > 4
    assert max(file.stat().st_size for file in (tmp_path / "many").glob("model-*")) < 22_000
    assert many.num_weights == one.num_weights == len(saved_keys(base))
    assert many.num_merged == 14
    assert many.num_parameters == load_model(base).num_parameters()
    torch.testing.assert_close(
        logits_of(load_model(tmp_path / "many"), INPUTS),
        logits_of(load_model(tmp_path / "one"), INPUTS),
        rtol=0,
        atol=0,
    )


def test_hf_layout_has_native_names_and_loads_and_goes_back(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    merged = check_merge(base, adapter, tmp_path / "hf", layout="hf")
    names = {name for name, _ in load_model(base).named_parameters()}
    assert saved_keys(tmp_path / "hf") == names
    load_model(tmp_path / "hf", dtype="float32").save_pretrained(tmp_path / "back")
    assert saved_keys(tmp_path / "back") == saved_keys(base)
    # a base in that layout: the original names are made anew
    again = tmp_path / "again"
    merge_adapter(adapter, again, base=base, layout="hf")
    second = make_adapter(again, tmp_path / "second", lora(target_modules=LINEAR), seed=2)
    assert (check_merge(again, second, tmp_path / "twice") - merged).abs().max() > 0.01
    assert saved_keys(tmp_path / "twice") == saved_keys(base)


def test_base_rounded_to_4_bits_is_what_qlora_trained_on(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    expected = adapted_logits(base, adapter, quantization="4bit")
    merge_adapter(adapter, tmp_path / "merged", base=base, base_quantization="4bit")
    merged = logits_of(load_model(tmp_path / "merged", dtype="float32"), INPUTS)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert (expected - adapted_logits(base, adapter)).abs().max() > 0.01
    training = json.loads((tmp_path / "merged" / "training.json").read_text())
    assert training["merged_adapter"]["base_quantization"] == "4bit"


def test_base_stored_in_4_bits_is_dequantised(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    load_model(base, dtype="float32", quantization="4bit").save_pretrained(tmp_path / "base")
    expected = adapted_logits(tmp_path / "base", adapter)
    assert (expected - adapted_logits(base, adapter)).abs().max() > 0.01
    result = merge_adapter(adapter, tmp_path / "merged", base=tmp_path / "base")
    merged = load_model(tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(logits_of(merged, INPUTS), expected, rtol=0, atol=1e-5)
    assert result.dtype == torch.float32
    assert saved_keys(tmp_path / "merged") == saved_keys(base)
    assert "quantization_config" not in config_json(tmp_path / "merged")


def test_base_stored_in_8_bits_is_dequantised(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    load_model(base, dtype="float32", quantization="8bit").save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".SCB")]:
        weight = name.removesuffix("SCB") + "weight"
        tensors[weight] = tensors[weight] * tensors.pop(name)[:, None] / 127
        tensors.pop(name.removesuffix("SCB") + "weight_format", None)
    load_model(base).save_pretrained(tmp_path / "by-hand")
    save_file(tensors, tmp_path / "by-hand" / "model.safetensors", {"format": "pt"})
    expected = adapted_logits(tmp_path / "by-hand", adapter)
    merge_adapter(adapter, tmp_path / "merged", base=tmp_path / "base")
    merged = logits_of(load_model(tmp_path / "merged", dtype="float32"), INPUTS)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert saved_keys(tmp_path / "merged") == saved_keys(base)


def test_larger_vocabulary_of_the_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    for family in ("llada", "Dream"):
        model = load_model(bases[family], dtype="float32")
        model.resize_token_embeddings(136, mean_resizing=False)
        peft_model = get_peft_model(model, lora(**LORAS["saved"]))
        randomise(peft_model)
        peft_model.save_pretrained(tmp_path / family)
        write_adapter_facts(tmp_path / family, model.config)
        merge_adapter(tmp_path / family, tmp_path / f"{family}-merged", base=bases[family])
        merged = load_model(tmp_path / f"{family}-merged", dtype="float32")
        assert logits_of(merged, INPUTS).shape[-1] == 136
        torch.testing.assert_close(logits_of(merged, INPUTS), logits_of(peft_model, INPUTS), rtol=0, atol=1e-5)


def test_biases_saved_beside_an_adapter_are_taken_from_it(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(bases["Dream"], dtype="float32")
    peft_model = get_peft_model(model, lora(target_modules=["q_proj"], bias="all"))
    randomise(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=bases["Dream"])
    merged = load_model(tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(logits_of(merged, INPUTS), logits_of(peft_model, INPUTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fixture", ["llada_tiny_ref", "dream_tiny_ref"])
def test_merged_weights_have_the_names_and_shapes_of_the_authors_files(tmp_path: Path, fixture: str) -> None:
    base = FIXTURES / fixture
    adapter = make_adapter(base, tmp_path / "adapter", lora(target_modules=LINEAR))
    check_merge(base, adapter, tmp_path / "merged")
    published, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {
        name: (t.shape, t.dtype) for name, t in published.items()
    }
    assert config_json(tmp_path / "merged") == config_json(base)


def test_what_lies_beside_the_weights_is_taken_along(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    load_model(bases["llada"]).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    (base / "LICENSE").write_text("MIT")
    (base / "README.md").write_text("of the base")
    adapter = make_adapter(base, tmp_path / "adapter", lora(target_modules=["q_proj"]))
    merge_adapter(adapter, tmp_path / "plain")
    assert load_tokenizer(tmp_path / "plain").mask_token == "<|mdm_mask|>"

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(adapter)
    (adapter / "recipe.yaml").write_text("seed: 3")
    (adapter / "training.json").write_text(json.dumps({"base_model": "org/base", "steps": 7}))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["auto_mapping"]["dlm_tune"] |= {"guidance_keep_token_ids": [0, 5], "guidance_distillation_scale": 1.5}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge_adapter(adapter, tmp_path / "merged")
    assert load_tokenizer(tmp_path / "merged").chat_template == "{{ messages }}"
    assert config_json(tmp_path / "merged")["guidance_keep_token_ids"] == [0, 5]
    assert config_json(tmp_path / "merged")["guidance_distillation_scale"] == 1.5
    training = json.loads((tmp_path / "merged" / "training.json").read_text())
    assert training["base_model"] == "org/base"
    assert training["merged_adapter"] == {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_quantization": None}
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"LICENSE", "recipe.yaml", "tokenizer.json", "generation_config.json"} <= names
    assert not {"README.md", "adapter_config.json"} & names
