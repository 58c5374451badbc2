"""Adapters, bases and settings that cannot be merged: the error says why, and nothing is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dlm_tune.models import load_model, merge_adapter
from tests.models.test_merge import LINEAR, lora, make_adapter
from tests.tiny_models import save_tiny_checkpoint

PROMPT = PromptTuningConfig(
    num_virtual_tokens=3, token_dim=32, num_layers=2, num_attention_heads=4, task_type="CAUSAL_LM"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> tuple[Path, Path]:
    """A LLaDA base, and a LoRA of all its linear layers."""
    folder = tmp_path_factory.mktemp("plain")
    base = save_tiny_checkpoint(folder / "base")
    return base, make_adapter(base, folder / "adapter", lora(target_modules=LINEAR))


def test_faults_of_arguments_are_named(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    cases: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "int8"}, "dtype='int8' is not a type to merge to; use bfloat16, float16, float32"),
        ({"layout": "llama"}, "layout='llama' is unknown; use 'original' or 'hf'"),
        ({"base_quantization": "8bit"}, "base_quantization='8bit' cannot be merged into: use '4bit'"),
        ({"max_shard_size": "large"}, "max_shard_size='large' is no size; use a number and its unit, such as 5GB"),
        ({"base": adapter}, "is itself an adapter: merge that one first"),
        ({"base": tmp_path / "nowhere"}, "nowhere' does not exist"),
        ({"adapter": base}, "holds a full model .config.json.; give the directory of a saved adapter"),
        ({"adapter": tmp_path}, "holds no adapter_config.json; give the directory of a saved adapter"),
    ]
    for settings, message in cases:
        arguments = {"adapter": adapter, "output_dir": tmp_path / "out", "base": base} | settings
        with pytest.raises(ValueError, match=message):
            merge_adapter(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_output_directories_that_hold_something_are_kept(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    output = tmp_path / "out"
    merge_adapter(adapter, output, base=base)
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"is not empty; choose another one, or set overwrite"):
        merge_adapter(adapter, output, base=base, dtype="bfloat16")
    for source in (base, adapter):
        with pytest.raises(ValueError, match=r"would replace .*, from which is read"):
            merge_adapter(adapter, source, base=base, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before
    merge_adapter(adapter, output, base=base, dtype="bfloat16", overwrite=True)
    assert (output / "model.safetensors").stat().st_size < len(before)


def test_base_of_another_kind_is_refused(plain: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = plain[1]
    with pytest.raises(ValueError, match=r"does not fit the model .*model_type is 'llada' in the adapter and 'Dream'"):
        merge_adapter(adapter, tmp_path / "out", base=save_tiny_checkpoint(tmp_path / "Dream", "Dream"))
    wider = save_tiny_checkpoint(tmp_path / "wider", d_model=64, mlp_hidden_size=64)
    with pytest.raises(ValueError, match=r"hidden_size is 32 in the adapter and 64 in the model"):
        merge_adapter(adapter, tmp_path / "out", base=wider)
    foreign = shutil.copytree(adapter, tmp_path / "foreign")  # of another program: it does not say what its base was
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": None}))
    with pytest.raises(ValueError, match=r"does not fit the model .*size mismatch"):
        merge_adapter(foreign, tmp_path / "out", base=wider)
    (foreign / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"names no base_model_name_or_path.*give the base with base="):
        merge_adapter(foreign, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named_and_leave_nothing(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    lacking = tmp_path / "lacking"
    load_model(base).save_pretrained(lacking)
    tensors = load_file(lacking / "model.safetensors")
    short = {name: tensor for name, tensor in tensors.items() if "ln_f" not in name}
    save_file(short, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing from the files .model.norm.weight."):
        merge_adapter(adapter, tmp_path / "out", base=lacking)
    halved = {name: tensor[:1] if "ln_f" in name else tensor for name, tensor in tensors.items()}
    save_file(halved, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight is \[1\] instead of \[32\]"):
        merge_adapter(adapter, tmp_path / "out", base=lacking)
    save_file(tensors | {"model.transformer.extra": torch.zeros(1)}, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are unknown to the model .model.transformer.extra."):
        merge_adapter(adapter, tmp_path / "out", base=lacking)
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"is truncated or corrupt"):
        merge_adapter(broken, tmp_path / "out", base=base)
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        merge_adapter(broken, tmp_path / "out", base=base)
    assert {path.name for path in tmp_path.iterdir()} == {"lacking", "broken"}


def test_weights_that_are_not_finite_are_not_written(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    diverged = shutil.copytree(adapter, tmp_path / "diverged")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.1.self_attn.k_proj.lora_B" in name)
    save_file(tensors | {name: tensors[name] / 0}, diverged / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be merged into model\.layers\.1\.self_attn\.k_proj: NaNs detected"):
        merge_adapter(diverged, tmp_path / "out", base=base)
    save_file(tensors | {name: tensors[name] * 1e7}, diverged / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"blocks\.1\.k_proj\.weight is not finite in float16 .largest value"):
        merge_adapter(diverged, tmp_path / "out", base=base, dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"diverged"}


def test_adapters_without_a_merge_are_refused(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base = plain[0]
    prompt = make_adapter(base, tmp_path / "prompt", PROMPT)
    with pytest.raises(ValueError, match=r"PROMPT_TUNING adds inputs and no weights: there is nothing to merge"):
        merge_adapter(prompt, tmp_path / "out", base=base)
    loha = make_adapter(base, tmp_path / "loha", LoHaConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapters of LOHA are merged into weights of full precision only"):
        merge_adapter(loha, tmp_path / "out", base=base, base_quantization="4bit")
    load_model(base, quantization="4bit").save_pretrained(tmp_path / "quantised")
    adapter = make_adapter(base, tmp_path / "lora", lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"base_quantization='4bit': the weights in .* are quantised already"):
        merge_adapter(adapter, tmp_path / "out", base=tmp_path / "quantised", base_quantization="4bit")
    biased = make_adapter(base, tmp_path / "biased", lora(target_modules=["o_proj"], lora_bias=True))
    with pytest.raises(ValueError, match=r"cannot be merged into model\.layers\.0\.self_attn\.o_proj: .* has no bias"):
        merge_adapter(biased, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_vocabularies_that_do_not_fit_are_refused(plain: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_model(plain[0], dtype="float32")
    model.resize_token_embeddings(136, mean_resizing=False)
    for name, layers in {"table-only": ["embed_tokens"], "both": ["embed_tokens", "lm_head"]}.items():
        peft_model = get_peft_model(model, lora(target_modules=["q_proj"], modules_to_save=layers))
        peft_model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        model = peft_model.unload()
    with pytest.raises(ValueError, match=r"the adapter brings model.embed_tokens.weight with 136 rows and the base"):
        merge_adapter(tmp_path / "table-only", tmp_path / "out", base=plain[0])
    larger = save_tiny_checkpoint(tmp_path / "larger", vocab_size=160, embedding_size=160)
    with pytest.raises(
        ValueError, match=r"with 136 rows and the base has 160: .* a smaller one is that of another base"
    ):
        merge_adapter(tmp_path / "both", tmp_path / "out", base=larger)


def test_larger_table_whose_tied_head_the_adapter_lacks_is_refused(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", weight_tying=True)
    model = load_model(base, dtype="float32")
    model.resize_token_embeddings(136, mean_resizing=False)
    peft_model = get_peft_model(model, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    base = base.rename(tmp_path / "elsewhere")  # PEFT cannot look up the base, and saves no tables of its own accord
    peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"an embedding table of 136 rows, and the head, .* has the base's 128"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
