"""accelerate_configs/: each is what accelerate understands, and two processes on a CPU are really two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from dlm_tune.commands.launch import EXPECTED_PROCESSES, check_parallelism, check_processes, take_launch_arguments
from dlm_tune.recipe import RecipeError
from dlm_tune.shipped import shipped_root
from tests.test_recipes_shipped import write_rows
from tests.tiny_models import save_tiny_checkpoint

FOLDER = shipped_root() / "accelerate_configs"
# name -> (distributed type, processes, ZeRO stage)
EXPECTED = {
    "cpu": ("NO", 1, None),
    "cpu_two_processes": ("MULTI_GPU", 2, None),
    "fsdp2": ("FSDP", 8, None),
    "multi_gpu": ("MULTI_GPU", 8, None),
    "multi_node": ("MULTI_GPU", 16, None),
    "single_gpu": ("NO", 1, None),
    "zero1": ("DEEPSPEED", 8, 1),
    "zero2": ("DEEPSPEED", 8, 2),
    "zero3": ("DEEPSPEED", 8, 3),
    "zero3_offload": ("DEEPSPEED", 8, 3),
}


def test_the_list_is_complete():
    assert sorted(path.stem for path in FOLDER.glob("*")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name):
    kind, num_processes, stage = EXPECTED[name]
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    parsed = launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "script.py"])
    parsed, _, _ = _validate_launch_command(parsed)
    assert parsed.num_processes == num_processes
    assert parsed.use_deepspeed == (kind == "DEEPSPEED")
    assert parsed.use_fsdp == (kind == "FSDP")
    assert parsed.use_cpu == (name == "cpu")
    if stage is not None:
        assert int(parsed.zero_stage) == stage
    if kind == "FSDP":
        assert int(parsed.fsdp_version) == 2
        assert parsed.fsdp_state_dict_type == "FULL_STATE_DICT"


@pytest.mark.parametrize("name", EXPECTED)
def test_our_launcher_takes_it(name):
    launch, remaining = take_launch_arguments("sft", ["--accelerate_config", name, "--config", "x"])
    assert launch.config_file == FOLDER / f"{name}.yaml"
    assert launch.num_processes == EXPECTED[name][1]
    assert remaining == ["--config", "x"]


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 2\n", [], "one process instead of 2"),
        ("distributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\n", [], "one process instead of 2"),
        ("distributed_type: 'NO'\nnum_processes: 1\n", ["--num_processes", "4"], "one process instead of 4"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\n", ["--num_processes", "1"], "needs at least 2 processes"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\n", ["--num_processes", "two"], "expected an integer"),
        ("num_processes: 2\nnum_processes: 3\n", [], "duplicate key 'num_processes'"),
    ],
)
def test_configurations_that_would_not_do_what_they_say(tmp_path, text, flags, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        take_launch_arguments("sft", ["--accelerate_config", str(path), *flags])


@pytest.mark.parametrize(
    ("verb", "flags", "words"),
    [
        ("sft", ["--num_processes", "2"], "no effect without --accelerate_config"),
        ("generate", ["--accelerate_config", "cpu"], "runs in one process"),
        ("sft", ["--accelerate_config"], "needs a value"),
    ],
)
def test_launcher_flags_out_of_place(verb, flags, words):
    with pytest.raises(RecipeError, match=words):
        take_launch_arguments(verb, flags)


def test_too_few_processes_is_an_error(monkeypatch):
    monkeypatch.setenv(EXPECTED_PROCESSES, "2")
    with pytest.raises(OSError, match="asks for 2 processes, but 1 run"):
        check_processes()


def test_dropped_sharding_is_an_error(monkeypatch):
    check_parallelism("MULTI_CPU")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_parallelism("FSDP")
    with pytest.raises(OSError, match="asks for FSDP, but MULTI_CPU runs"):
        check_parallelism("MULTI_CPU")


def train(tmp_path: Path, start: list[str], *flags: str) -> dict:
    """Run two steps in subprocesses and return results.json."""
    model = save_tiny_checkpoint(tmp_path / "model")
    data = write_rows(tmp_path / "data", "pairs")
    arguments = ["sft", "--model_name_or_path", str(model), "--dataset_name", str(data), "--max_steps", "2"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "2", "--max_length", "64"]
    arguments += ["--gradient_checkpointing", "false", "--save_strategy", "no", "--evaluate_before", "false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    finished = subprocess.run(
        [sys.executable, "-m", *start, *arguments, *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    assert finished.stdout.count("The model lies in") == 1, "only the first process prints"
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_dlm_tune_starts_two_processes(tmp_path):
    results = train(tmp_path, ["dlm_tune"], "--accelerate_config", "cpu_two_processes")
    assert results["num_processes"] == 2
    assert results["distributed_type"] == "MULTI_CPU"


@pytest.mark.slow
def test_accelerate_launch_starts_two_processes(tmp_path):
    start = ["accelerate.commands.launch", "--config_file", str(FOLDER / "cpu_two_processes.yaml"), "-m", "dlm_tune"]
    assert train(tmp_path, start)["num_processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("start", [["dlm_tune"], ["accelerate"]])
def test_one_process_on_the_cpu(tmp_path, start):
    if start == ["dlm_tune"]:
        results = train(tmp_path, start, "--accelerate_config", "cpu")
    else:
        command = ["accelerate.commands.launch", "--config_file", str(FOLDER / "cpu.yaml"), "-m", "dlm_tune"]
        results = train(tmp_path, command)
    assert results["num_processes"] == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_leaves_with_its_exit_code_and_last_words(processes):
    program = (
        "import atexit, sys; from dlm_tune.commands.launch import leave\n"
        "atexit.register(print, 'tracker closed'); print('done', end=' '); leave(3)"
    )
    environment = os.environ | {"WORLD_SIZE": str(processes)}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=FOLDER.parent, env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (3, "done tracker closed\n")
