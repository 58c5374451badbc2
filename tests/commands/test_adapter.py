"""Adapters from a recipe to training, folder and reloading; going on from one; quantised bases."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dlm_tune.cli import main
from dlm_tune.models import load_model
from tests.models.test_loading import logits_of
from tests.test_cli import error_of
from tests.test_recipes_shipped import write_rows
from tests.tiny_models import save_tiny_checkpoint

TOKENS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
ADAPTER = {"use_peft": "true", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_tiny_checkpoint(folder / "model", d_model=64, mlp_hidden_size=128, n_layers=1)
    write_rows(folder / "data", "pairs")
    return folder


def write_recipe(workspace, folder, **settings):
    keys = {
        "model_name_or_path": workspace / "model",
        "dataset_name": workspace / "data",
        "output_dir": folder / "run",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "gradient_checkpointing": "false",
        "save_strategy": '"no"',
        "logging_steps": 1,
        "learning_rate": "1e-2",
        "use_cpu": "true",
        "eos_policy": "one",
        "noise_schedule": "linear",
        "evaluate_before": "false",
        "bf16": "false",
        **settings,
    }
    (folder / "recipe.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return str(folder / "recipe.yaml")


def run_sft(*arguments):
    assert main(["sft", "--debug", "--config", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def first_run(workspace):
    folder = workspace / "first"
    folder.mkdir()
    run_sft(write_recipe(workspace, folder, **ADAPTER))
    return folder / "run"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_dora": "true"}, {"use_dora": True}),
        ({"use_rslora": "true"}, {"use_rslora": True}),
        ({"lora_target_modules": "[q_proj]"}, {"target_modules": ["q_proj"]}),
        ({"lora_modules_to_save": "[embed_tokens, lm_head]"}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ({"load_in_4bit": "true", "use_bnb_nested_quant": "true"}, {"r": 4}),
    ],
    ids=["dora", "rslora", "one layer", "modules_to_save", "4 bits"],
)
def test_adapters_of_a_recipe_train_and_reload(workspace, tmp_path, monkeypatch, capsys, settings, expected):
    """The logits of the folder are those of the model in the trainer's memory."""
    from dlm_tune.commands import train as command

    trainers = []
    build = command.build_trainer
    monkeypatch.setattr(command, "build_trainer", lambda *args: trainers.append(build(*args)) or trainers[-1])
    run_sft(write_recipe(workspace, tmp_path, **ADAPTER, **settings))
    bits = " --load_in_4bit true" if "load_in_4bit" in settings else ""
    assert f"--model_name_or_path {tmp_path / 'run'}{bits} --prompt" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert {name: config[name] for name in expected} == expected
    assert config["auto_mapping"]["dlm_tune"]["num_hidden_layers"] == 1
    assert config["base_model_name_or_path"] == str(workspace / "model")
    quantization = trainers[0].model.config.quantization_config if "load_in_4bit" in settings else None
    loaded = load_model(tmp_path / "run", quantization=quantization)
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(trainers[0].model.eval(), TOKENS))
    moved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in moved.items() if "lora_B" in name)


def test_training_goes_on_from_an_adapter(workspace, first_run, tmp_path):
    """It starts where the earlier run ended; what is saved belongs to the same base."""
    run_sft(
        first_run / "recipe.yaml", "--model_name_or_path", first_run, "--output_dir", tmp_path / "run",
        "--evaluate_before", "true", "--max_steps", "3",
    )  # fmt: skip
    earlier, later = (json.loads((folder / "results.json").read_text()) for folder in (first_run, tmp_path / "run"))
    assert later["before"]["eval_nelbo"] == earlier["after"]["eval_nelbo"]
    assert later["after"]["eval_nelbo"] < later["before"]["eval_nelbo"]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(workspace / "model")
    assert config["r"] == 4
    assert not (tmp_path / "run" / "config.json").exists()
    evaluate = ["eval", "--config", str(tmp_path / "run" / "recipe.yaml"), "--model_name_or_path"]
    assert main([*evaluate, str(tmp_path / "run"), "--output_file", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["likelihood"]["eval_nelbo"] == pytest.approx(later["after"]["eval_nelbo"], rel=1e-6)


def test_a_short_recipe_goes_on_from_an_adapter_in_4_bits(workspace, first_run, tmp_path, capsys):
    recipe = write_recipe(workspace, tmp_path, model_name_or_path=first_run, use_peft="true", load_in_4bit="true")
    run_sft(recipe)
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["lora_alpha"] == 8
    assert "The adapter lies in" in capsys.readouterr().out
    assert main(["inspect", "--config", recipe, "--estimate"]) == 0
    assert "linear layers in 4 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_r": 8}, "lora_r = 8, but the adapter"),
        ({"lora_target_modules": "[q_proj, v_proj]"}, "lora_target_modules = ['q_proj', 'v_proj'], but the adapter"),
        ({"use_dora": "true"}, "has use_dora = False"),
        ({"lora_r": 4}, "lora_r has no effect where training goes on"),
        ({"use_peft": "false"}, "use_peft = False"),
    ],
)
def test_keys_that_say_otherwise_than_the_adapter_are_refused(workspace, first_run, tmp_path, capsys, settings, words):
    recipe = write_recipe(workspace, tmp_path, **({"use_peft": "true"} | settings), model_name_or_path=first_run)
    message = error_of(capsys, "sft", "--config", recipe)
    assert words in message
    assert "recipe.yaml:" in message
    assert not (tmp_path / "run").exists()


def test_flags_that_describe_the_adapter_have_no_effect(first_run, tmp_path, capsys):
    arguments = ["sft", "--config", str(first_run / "recipe.yaml"), "--model_name_or_path", str(first_run)]
    message = error_of(capsys, *arguments, "--output_dir", str(tmp_path / "run"), "--lora_r", "4")
    assert "--lora_r: lora_r has no effect where training goes on" in message


def test_a_base_that_was_moved_names_the_remedy(first_run, tmp_path, capsys):
    adapter = shutil.copytree(first_run, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    arguments = ["sft", "--config", str(first_run / "recipe.yaml"), "--model_name_or_path", str(adapter)]
    message = error_of(capsys, *arguments, "--output_dir", str(tmp_path / "run"))
    assert f"write the place into base_model_name_or_path of {adapter}/adapter_config.json" in message.replace(
        "\n", ""
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_target_modules": "[attn_out, ff_proj]"}, "attn_out -> o_proj; ff_proj -> gate_proj"),
        ({"lora_target_modules": "[query]"}, "names 'query', of which the model LLaDAModelLM has none"),
        (
            {"load_in_4bit": "true", "load_in_8bit": "true"},
            "load_in_8bit = True has no effect with load_in_4bit: true",
        ),
        ({"use_peft": "false", "load_in_4bit": "true"}, "load_in_4bit = True has no effect with use_peft: false"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type = 'fp4' has no effect with load_in_4bit: false"),
    ],
)
def test_faults_of_an_adapter_in_a_recipe(workspace, tmp_path, capsys, settings, words):
    keys = {"use_peft": "true", **settings}
    assert words in error_of(capsys, "sft", "--config", write_recipe(workspace, tmp_path, **keys))
