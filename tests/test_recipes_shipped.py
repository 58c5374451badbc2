"""Every recipe under recipes/: strict parse, real configuration objects, two steps on a tiny model and tiny data."""

import json
import math
from pathlib import Path

import pytest

from dlm_tune.cli import main
from dlm_tune.commands.run import read_arguments
from dlm_tune.models.loading import load_config
from dlm_tune.shipped import shipped_root
from tests.models.test_convert import save_causal
from tests.tiny_models import save_tiny_checkpoint

ROOT = shipped_root() / "recipes"
ALL_RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.y*ml"))
CONVERSIONS = [name for name in ALL_RECIPES if name.split("/")[1] == "convert"]
RECIPES = [name for name in ALL_RECIPES if name not in CONVERSIONS]
REQUIRED = {
    "dream-7b/sft/full.yaml",
    "dream-7b/sft/guidance.yaml",
    "dream-7b/sft/lora.yaml",
    "dream-7b/sft/qlora.yaml",
    "llada-8b/pretrain/continued.yaml",
    "llada-8b/sft/full.yaml",
    "llada-8b/sft/guidance.yaml",
    "llada-8b/sft/lora.yaml",
    "llada-8b/sft/qlora.yaml",
    "quickstart/pretrain/base.yaml",
    "quickstart/sft/lora.yaml",
    "qwen3-0.6b/pretrain/converted.yaml",
}
_ran: list[str] = []


def verb_of(name: str) -> str:
    return name.split("/")[1]


def write_rows(folder: Path, kind: str) -> Path:
    """A data set with the splits train (24 rows) and test (4 rows)."""
    rows = {
        "text": lambda i: {"text": f"line {i} of some plain text"},
        "pairs": lambda i: {"prompt": f"past of w{i}: ", "completion": f"w{i}ed"},
        "messages": lambda i: {
            "messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]
        },
    }[kind]
    folder.mkdir()
    for split, numbers in (("train", range(24)), ("test", range(24, 28))):
        text = "".join(json.dumps(rows(number)) + "\n" for number in numbers)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def tiny_flags(name: str, tmp_path: Path) -> list[str]:
    """Flags that put a tiny model and tiny data of the right format in place of the recipe's, and stop soon."""
    recipe = read_arguments(verb_of(name), ["--config", name])
    if name.startswith("qwen3"):
        model = run_conversion("qwen3-0.6b/convert/base.yaml", tmp_path)
    else:
        model = save_tiny_checkpoint(tmp_path / "model", "Dream" if name.startswith("dream") else "llada")
    kind = "text" if verb_of(name) == "pretrain" else "messages" if "-7b/" in name or "-8b/" in name else "pairs"
    data = write_rows(tmp_path / "data", kind)
    flags = ["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    flags += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    flags += ["--max_length", "200", "--evaluate_before", "false", "--dataset_num_proc", "null"]
    if "datasets" in recipe:
        entries = [{**entry, "path": str(data)} for entry in recipe.get("datasets")]
        flags += ["--datasets", json.dumps(entries)]
    else:
        flags += ["--dataset_name", str(data), "--dataset_config", "null", "--dataset_train_split", "train"]
    if "eval_dataset_name" in recipe:
        flags += ["--eval_dataset_name", str(data)]
    if "unpaired_dataset" in recipe:
        flags += ["--unpaired_dataset", str(write_rows(tmp_path / "unpaired", "text"))]
        flags += ["--unpaired_dataset_config", "null", "--unpaired_dataset_split", "train"]
    if "test_split_size" in recipe:
        flags += ["--test_split_size", "4"]
    return flags


def run_conversion(name: str, tmp_path: Path) -> Path:
    """Run a conversion recipe on a tiny checkpoint of its class."""
    source = save_causal(tmp_path / "ar", name.split("-")[0])
    flags = ["--model_name_or_path", str(source), "--output_dir", str(tmp_path / "converted")]
    assert main(["convert", "--config", name, "--debug", *flags]) == 0
    return tmp_path / "converted"


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion_writes_a_checkpoint(name, tmp_path):
    (arguments,) = read_arguments("convert", ["--config", name]).build()
    assert arguments.output_dir == f"outputs/{name.removesuffix('.yaml')}"
    config, _ = load_config(run_conversion(name, tmp_path))
    assert config.mask_token_id is not None
    assert config.logits_shift is arguments.logits_shift


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_its_objects(name):
    recipe = read_arguments(verb_of(name), ["--config", name, "--use_cpu", "true"])
    run_arguments, model_arguments, data_arguments, config = recipe.build()
    assert model_arguments.model_name_or_path
    assert config.output_dir.startswith("outputs/")
    assert data_arguments.dataset_name or data_arguments.datasets
    assert run_arguments.overwrite_output_dir is False


@pytest.mark.parametrize("name", [name for name in RECIPES if "-7b/" in name or "-8b/" in name])
def test_large_recipe_states_its_command_memory_and_result(name):
    text = (ROOT / name).read_text()
    for words in (
        f"dlm-tune {verb_of(name)} --config {name.removesuffix('.yaml')} --accelerate_config",
        f"-m dlm_tune {verb_of(name)} --config recipes/{name}",
        "# Sources:",
        "# Result:",
        "# Memory",
    ):
        assert words in text


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_two_steps(name, tmp_path):
    assert main([verb_of(name), "--config", name, "--debug", *tiny_flags(name, tmp_path)]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    weights = ["adapter_model.safetensors", "model.safetensors"]
    assert any((tmp_path / "out" / file).is_file() for file in weights)
    after = json.loads((tmp_path / "out" / "results.json").read_text())["after"]
    assert after is None or math.isfinite(after["eval_nelbo"])
    _ran.append(name)


def test_every_recipe_ran(request):
    assert set(RECIPES) >= REQUIRED
    collected = [item for item in request.session.items if item.originalname == "test_recipe_trains_two_steps"]
    assert len(_ran) == len(collected), f"ran: {_ran}"
