"""`inspect --estimate`: counts against counting by hand and against a real run."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from dlm_tune.cli import main
from dlm_tune.commands.estimate import step_setup
from dlm_tune.commands.estimate_figures import data_figures, expected_masked, step_figures
from dlm_tune.commands.inspect_batch import base_config, data_only_trainer
from dlm_tune.commands.run import read_arguments
from dlm_tune.diffusion import MASKINGS, NOISE_SCHEDULES, corrupt
from dlm_tune.trainers import DiffusionConfig
from dlm_tune.trainers.step_noise import noise_schedule
from tests.commands.test_inspect_batch import workspace
from tests.hub_server import HubServer
from tests.tiny_models import EOS_ID, MASK_ID, tiny_llada, tiny_tokenizer


def build(recipe_path, *flags):
    """Trainer, model arguments and model config, as the command has them."""
    recipe = read_arguments("inspect", ["--config", recipe_path, "--estimate", *flags])
    _, _, model_arguments, data_arguments, config = recipe.build()
    return data_only_trainer(model_arguments, data_arguments, config), model_arguments, base_config(model_arguments)[1]


def estimate(capsys, recipe_path, *flags):
    assert main(["inspect", "--debug", "--config", recipe_path, "--estimate", *flags]) == 0
    return capsys.readouterr().out


# Expected masks


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_expected_masked_is_the_mean_over_noise(tmp_path, name, masking):
    config = DiffusionConfig(str(tmp_path), noise_schedule=name, masking=masking, use_cpu=True, bf16=False)
    num_targets = torch.tensor([1, 2, 7, 12])
    expected = expected_masked(num_targets, config)
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    for size, value in zip(num_targets.tolist(), expected.tolist(), strict=True):
        noisy = corrupt(
            torch.zeros(draws, size, dtype=torch.int64),
            torch.ones(draws, size, dtype=torch.bool),
            torch.rand(draws, dtype=torch.float64, generator=generator),
            torch.rand(draws, size, dtype=torch.float64, generator=generator),
            schedule=noise_schedule(config),
            masking=masking,
            mask_token_id=1,
        )
        counts = noisy.masked.sum(dim=1).double()
        assert abs(float(counts.mean()) - value) <= 4 * float(counts.std()) / math.sqrt(draws) + 1e-3 * value


def test_expected_masked_of_the_linear_schedule_in_closed_form(tmp_path):
    sizes = torch.tensor([1, 5, 100, 5])
    config = DiffusionConfig(str(tmp_path), noise_schedule="linear", use_cpu=True, bf16=False)
    assert expected_masked(sizes, config).tolist() == pytest.approx([1, 3, 50.5, 3], rel=1e-3)
    settings = {"noise_schedule": "linear", "masking": "bernoulli", "noise_epsilon": 0.2}
    config = DiffusionConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert expected_masked(sizes, config).tolist() == pytest.approx([0.6, 3, 60, 3], rel=1e-9)


# Data


@pytest.mark.parametrize("normalization", ["tokens", "sequences"])
@pytest.mark.parametrize("eos_policy", ["one", "pad_to_block", "pad_to_max", "none"])
def test_counts_and_entropy_of_the_data(tmp_path, normalization, eos_policy):
    settings = {"block_length": 8} if eos_policy == "pad_to_block" else {}
    recipe = workspace(tmp_path, loss_normalization=normalization, eos_policy=eos_policy, **settings)
    figures = data_figures(build(recipe)[0])

    def num_eos(answer: str) -> int:
        return (-len(answer) % 8 or 8) if eos_policy == "pad_to_block" else 1  # TRL itself adds one to rows of text

    answers = [f"w{i}ed" for i in range(24)]
    targets = [len(answer) + num_eos(answer) for answer in answers]
    assert figures.num_targets.tolist() == targets
    assert figures.lengths.tolist() == [
        len(f"past of w{i}: ") + number for i, number in zip(range(24), targets, strict=True)
    ]
    counts: Counter[str] = Counter()
    for answer, number in zip(answers, targets, strict=True):
        weight = 1 / number if normalization == "sequences" else 1
        for token in [*answer, *["EOS"] * num_eos(answer)]:
            counts[token] += weight
    shares = np.array(list(counts.values())) / sum(counts.values())
    assert figures.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert figures.num_kinds == len(counts)
    if normalization == "tokens":
        assert figures.entropy_bias == pytest.approx((len(counts) - 1) / (2 * sum(targets)))
    else:  # effective number of targets
        squares = sum(number / number**2 for number in targets)
        assert figures.entropy_bias == pytest.approx((len(counts) - 1) * squares / (2 * len(targets) ** 2))


def test_rows_left_out_and_cut_are_named(tmp_path, capsys):
    recipe = workspace(tmp_path, max_length=17, overlong_rows="drop")
    printed = estimate(capsys, recipe)
    # "past of w7: w7ed" and EOS are 17 tokens, the 14 rows from w10 on have 19
    assert re.search(r"^  rows +10$", printed, re.MULTILINE)
    assert "Left out 14 of 24 rows of the train data set: 14 x longer than max_length=17" in printed
    printed = estimate(capsys, recipe, "--overlong_rows", "truncate")
    assert re.search(r"^  rows +24$", printed, re.MULTILINE)
    assert "Cut the end of 14 of 24 rows of the train data set: max_length=17." in printed


# Steps


@pytest.mark.parametrize("packing", ["false", "true"])
def test_steps_and_tokens_are_those_of_the_run(tmp_path, packing, capsys):
    settings = {"per_device_train_batch_size": 2, "max_length": 48, "max_steps": -1, "num_train_epochs": 2}
    settings["logging_steps"] = 1
    recipe = workspace(tmp_path, packing=packing, eval_strategy='"no"', **settings)
    trainer, *_ = build(recipe)
    figures = step_figures(trainer)
    assert figures.num_sampled == figures.steps_per_epoch
    assert main(["sft", "--debug", "--config", recipe, "--evaluate_before", "false"]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert figures.total_steps == state["max_steps"] == state["global_step"]
    tokens = max(entry.get("num_tokens", 0) for entry in state["log_history"])
    assert figures.tokens * figures.total_steps == pytest.approx(tokens)
    data = data_figures(trainer)
    assert figures.tokens * figures.steps_per_epoch == pytest.approx(data.lengths.sum())
    assert figures.targets * figures.steps_per_epoch == pytest.approx(data.num_targets.sum())
    assert figures.rows * figures.steps_per_epoch == pytest.approx(24)
    printed = estimate(capsys, recipe)
    assert re.search(rf"steps in an epoch +{figures.steps_per_epoch} ", printed)
    assert re.search(rf"^  steps +{figures.total_steps}  2 epochs$", printed, re.MULTILINE)


def test_padding_of_packed_rows_is_that_of_the_plan(tmp_path):
    trainer, *_ = build(workspace(tmp_path, packing="true", per_device_train_batch_size=1, max_length=56))
    figures = step_figures(trainer)
    lengths = data_figures(trainer).lengths
    longest = [int(lengths[rows].sum()) for rows in trainer.train_dataset.plan]
    assert figures.padding == pytest.approx(0), "one sequence at a time is as long as its rows"
    assert figures.positions * figures.steps_per_epoch == pytest.approx(sum(longest))
    assert figures.is_padded, "documents of a sequence must not see each other"


@pytest.mark.parametrize("normalization", ["tokens", "sequences"])
def test_sum_of_the_weights(tmp_path, normalization):
    recipe = workspace(tmp_path, loss_normalization=normalization)
    figures = step_figures(build(recipe)[0])
    assert figures.weight_mean == pytest.approx(1, rel=1e-6), "nelbo, exact count"
    assert figures.weight_deviation == pytest.approx(0, abs=1e-6)
    assert sum(figures.bucket_share) == pytest.approx(1)
    noisy = step_figures(build(recipe, "--masking", "bernoulli")[0])
    assert noisy.weight_deviation > 0.05
    uniform = step_figures(build(recipe, "--loss_weighting", "uniform")[0])
    assert uniform.weight_mean == pytest.approx(uniform.masked / uniform.targets, rel=0.1)


def test_unpaired_rows_are_counted(tmp_path, capsys):
    """24 pairs and as many lines of text, each behind the prompt of a pair."""
    (tmp_path / "text.txt").write_text("".join(f"{letter * 20}\n" for letter in "abcdefgh"))
    recipe = workspace(tmp_path, unpaired_dataset=tmp_path / "text.txt")
    trainer, model_arguments, model_config = build(recipe)
    data = data_figures(trainer)
    assert len(data.lengths) == 48
    assert (data.num_targets == 21).sum() == 24, "20 letters and EOS"
    setup = step_setup(trainer, data, step_figures(trainer), model_arguments, model_config)
    assert setup.length == len("past of w10: ") + 21
    assert re.search(r"rows +48\n", estimate(capsys, recipe))


# Memory


def test_setup_is_the_largest_microbatch(tmp_path):
    recipe = workspace(
        tmp_path, use_peft="true", lora_r=4, gradient_checkpointing="true", bf16="true", optim="adafactor"
    )
    trainer, model_arguments, model_config = build(recipe)
    setup = step_setup(trainer, data_figures(trainer), step_figures(trainer), model_arguments, model_config)
    assert (setup.num_sequences, setup.length, setup.num_targets) == (6, 19, 6 * 6)  # "past of w10: w10ed" and EOS
    assert setup.has_mask
    assert setup.accumulates
    assert setup.gradient_checkpointing
    assert setup.dtype == torch.float32
    assert setup.autocast_dtype == torch.bfloat16
    assert setup.optim == "adafactor"
    assert setup.peft_config.r == 4
    trainer, model_arguments, model_config = build(recipe, "--packing", "true", "--max_length", "40")
    setup = step_setup(trainer, data_figures(trainer), step_figures(trainer), model_arguments, model_config)
    assert (setup.num_sequences, setup.length, setup.num_targets) == (6, 38, 6 * 12), "two rows of 19"


def test_8b_recipe_needs_no_weights(tmp_path, capsys):
    """A folder with LLaDA-8B's config and a tokenizer; training from it is refused, estimating works."""
    recipe = workspace(tmp_path, use_peft="true", dtype="bfloat16", gradient_checkpointing="false")
    folder = tmp_path / "model"
    (folder / "model.safetensors").unlink()
    config = tiny_llada().config
    for key, value in {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32}.items():
        setattr(config, key, value)
    config.mlp_hidden_size, config.vocab_size, config.embedding_size = 12288, 126464, 126464
    config.save_pretrained(folder)
    printed = estimate(capsys, recipe)
    adapter = 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 12288))  # rank 16 on all linear layers
    assert f"{8_015_581_184 + adapter:,} parameters, bfloat16" in printed
    assert f"adamw_torch_fused, {adapter:,} trained" in printed
    weights = float(re.search(r"^  weights +([\d.]+)", printed, re.MULTILINE)[1])
    assert weights == pytest.approx((2 * 8_015_581_184 + 4 * adapter) / 2**30, abs=0.01)
    assert f"{math.log(126464):.2f}  ln 126,464" in printed
    assert main(["sft", "--config", recipe]) == 2
    assert "has no model.safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_of_a_hub_repository_no_weights_are_fetched(tmp_path):
    recipe = workspace(tmp_path)
    repository = "user/tiny"
    code = f"""
import sys
from huggingface_hub import HfApi
from dlm_tune.cli import main
HfApi().create_repo("{repository}")
HfApi().upload_folder(folder_path={str(tmp_path / "model")!r}, repo_id="{repository}")
flags = ["--config", {recipe!r}, "--model_name_or_path", "{repository}"]
assert main(["inspect", "--debug", "--estimate", *flags]) == 0
"""
    with HubServer() as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr[-3000:]
        fetched = [request for request in hub.requests if request.startswith(("GET", "HEAD")) and "resolve" in request]
    assert "tensors together" in finished.stdout
    assert any("config.json" in request for request in fetched)
    assert not any("safetensors" in request for request in fetched)


def test_optimiser_without_known_state_says_so(tmp_path, capsys):
    printed = estimate(capsys, workspace(tmp_path), "--optim", "galore_adamw")
    assert "Not counted: the state of optim: galore_adamw" in printed


# The command line


@pytest.mark.parametrize("flags", [["--rows", "3"], ["--token_weights"], ["--color", "always"]])
def test_flags_of_the_display_have_no_effect_with_estimate(tmp_path, capsys, flags):
    recipe = workspace(tmp_path)
    assert main(["inspect", "--config", recipe, "--estimate", *flags]) == 2
    assert f"{flags[0]}: {flags[0][2:]}" in capsys.readouterr().err


def test_flags_that_only_the_estimate_reads(tmp_path, capsys):
    recipe = workspace(tmp_path)
    flags = ["--optim", "sgd", "--max_steps", "7"]
    assert "7  3.5 epochs" in estimate(capsys, recipe, *flags)
    assert main(["inspect", "--config", recipe, *flags]) == 2
    error = capsys.readouterr().err
    assert "--optim: has no effect in `dlm-tune inspect`" in error
    assert main(["inspect", "--config", recipe, "--estimate", "--learning_rate", "1"]) == 2
    assert "--learning_rate: has no effect" in capsys.readouterr().err


def test_loss_that_is_no_bound_is_told_apart(tmp_path, capsys):
    printed = estimate(capsys, workspace(tmp_path, loss_weighting="uniform"))
    assert re.search(r"loss / nelbo +0\.\d\d  .*loss_weighting: uniform.*`loss` starts at \d\.\d\d", printed)
    assert "loss / nelbo" not in estimate(capsys, str(tmp_path / "recipe.yaml"), "--loss_weighting", "nelbo")


def test_streaming_is_refused_as_elsewhere(tmp_path, capsys):
    recipe = workspace(tmp_path, dataset_streaming="true")
    assert main(["inspect", "--config", recipe, "--estimate"]) == 2
    assert "dataset_streaming=True is not supported" in capsys.readouterr().err


def test_ids_of_the_tiny_tokenizer():
    """The cases above rely on one token a character."""
    assert len(tiny_tokenizer()("w7ed")["input_ids"]) == 4
    assert EOS_ID != MASK_ID
