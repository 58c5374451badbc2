import resource
from pathlib import Path

import pytest

from dlm_tune.cli import main
from dlm_tune.models import load_model, merge_adapter
from tests.models.test_merge import LINEAR, lora, make_adapter
from tests.tiny_models import save_tiny_checkpoint


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter beside its base."""
    folder = tmp_path_factory.mktemp("merge")
    base = save_tiny_checkpoint(folder / "base")
    return make_adapter(base, folder / "adapter", lora(target_modules=LINEAR))


def test_command_merges_and_says_what_it_wrote(adapter, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["--dtype", "bfloat16", "--layout", "hf", "--max_shard_size", "20KB"]
    assert main(["merge", "--adapter", str(adapter), "--output_dir", str(output), *flags]) == 0
    text = capsys.readouterr().out
    files = len(list(output.glob("model-*.safetensors")))
    assert f"Merged {adapter} into {adapter.parent / 'base'}: 14 of 21 weights changed, 28,832 parameters" in text
    assert f"bfloat16, hf layout, 0.1 MB in {files} files" in text
    assert "4bit" not in text
    assert load_model(output, dtype="auto").config.model_type == "llada"


def test_command_tells_of_the_other_merge_of_qlora(adapter, tmp_path, capsys):
    (adapter / "recipe.yaml").write_text("load_in_4bit: true\nuse_bnb_nested_quant: true\n")
    flags = ["merge", "--adapter", str(adapter)]
    assert main([*flags, "--output_dir", str(tmp_path / "plain")]) == 0
    assert "add --base_quantization 4bit" in capsys.readouterr().out
    assert main([*flags, "--output_dir", str(tmp_path / "rounded"), "--base_quantization", "4bit"]) == 0
    assert "add --base_quantization" not in capsys.readouterr().out
    for recipe, flag, words in (
        ("load_in_4bit: true", [], "in NF4 without double quantisation. The merge is into those of the files"),
        ("load_in_4bit: true", ["--base_quantization", "4bit"], "The merge is into NF4 with it, which is close"),
        ("max_steps: 3", ["--base_quantization", "4bit"], "trained on weights that were not rounded"),
    ):
        (adapter / "recipe.yaml").write_text(recipe)
        assert main([*flags, "--output_dir", str(tmp_path / "plain again"), "--overwrite", *flag]) == 0
        assert words in capsys.readouterr().out
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "rounded")]
    assert weights[0] != weights[1]


def test_faults_of_the_command_line_are_named(adapter, tmp_path, capsys):
    for flags, message in (
        ([], "adapter is missing: the folder of a saved adapter"),
        (["--adapter", str(adapter)], "output_dir is missing: the folder for the merged checkpoint"),
        (["--model_revision", "v1"], "model_revision has no effect without model_name_or_path"),
        (["--adapter", str(adapter), "--output_dir", "x", "--layout", "gguf"], "gguf"),
        (["--adapter", str(adapter), "--output_dir", str(adapter.parent)], "would replace"),
    ):
        assert main(["merge", *flags]) != 0
        assert message in capsys.readouterr().err


def test_full_disk_leaves_the_merge_of_before(adapter, tmp_path):
    output = tmp_path / "out"
    merge_adapter(adapter, output, dtype="bfloat16")
    before = (output / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"writing .*out failed: .*File too large.* Nothing was changed there"):
            merge_adapter(adapter, output, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (output / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
