"""`--accelerate_config`: hand the same command to `accelerate launch`, and check afterwards that it obeyed."""

import atexit
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dlm_tune.recipe import RecipeError
from dlm_tune.recipe_yaml import read_yaml
from dlm_tune.shipped import find_yaml

EXPECTED_PROCESSES = "DLM_TUNE_EXPECTED_PROCESSES"
LAUNCHED_VERBS = ("pretrain", "sft", "eval")
_FLAGS = (
    "--accelerate_config",
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
    "--gpu_ids",
)


@dataclass(frozen=True)
class LaunchArguments:
    """A checked accelerate configuration with its flags."""

    config_file: Path
    flags: tuple[tuple[str, str], ...]
    num_processes: int


def take_launch_arguments(verb: str, arguments: list[str]) -> tuple[LaunchArguments | None, list[str]]:
    """Split the launcher's flags off the command line and check the configuration.

    Raises:
        RecipeError: flags of the launcher without `--accelerate_config`, a configuration that does not exist, or one
            that accelerate would run in fewer processes than it says.
    """
    taken, remaining = _split(arguments)
    name = taken.pop("--accelerate_config", None)
    title = "the launch"
    if name is None:
        if taken:
            raise RecipeError([f"{flag}: has no effect without --accelerate_config." for flag in taken], title)
        return None, remaining
    if verb not in LAUNCHED_VERBS:
        raise RecipeError([f"--accelerate_config: `dlm-tune {verb}` runs in one process. Remove it."], title)
    if {"LOCAL_RANK", "WORLD_SIZE", EXPECTED_PROCESSES} & os.environ.keys():
        raise RecipeError(["--accelerate_config: already running under a launcher. Remove one of the two."], title)
    path = find_yaml(name, "accelerate_configs")
    entries, faults = read_yaml(path)
    config = {key: value for key, value, _ in entries}
    for flag in ("--num_processes", "--num_machines", "--machine_rank"):
        if flag in taken and not taken[flag].isdigit():
            faults.append(f"{flag} {taken[flag]}: expected an integer.")
    if not faults:
        num_processes = int(taken.get("--num_processes", config.get("num_processes", 1)))
        faults += _config_faults(path, config, num_processes)
    if faults:
        raise RecipeError(faults, title)
    return LaunchArguments(path, tuple(taken.items()), num_processes), remaining


def _split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    taken: dict[str, str] = {}
    remaining: list[str] = []
    tokens = iter(arguments)
    for token in tokens:
        flag, equals, value = token.partition("=")
        flag = flag.replace("-", "_").replace("__", "--", 1) if flag.startswith("--") else flag
        if flag not in _FLAGS:
            remaining.append(token)
            continue
        value = value if equals else next(tokens, "")
        if not value or value.startswith("--"):
            raise RecipeError([f"{flag}: needs a value."], "the launch")
        taken[flag] = value
    return taken, remaining


def _config_faults(path: Path, config: dict[str, Any], num_processes: int) -> list[str]:
    """Configurations that accelerate 1.15 runs in one process without a word."""
    kind = str(config.get("distributed_type", "NO"))
    if num_processes > 1 and (kind in ("NO", "False", "MULTI_CPU") or config.get("use_cpu") is True):
        return [
            f"{path}: accelerate would start one process instead of {num_processes} with distributed_type: {kind} and "
            f"use_cpu: {str(config.get('use_cpu', False)).lower()}. For several processes, on CPUs too, write "
            "distributed_type: MULTI_GPU and use_cpu: false (see accelerate_configs/cpu_two_processes.yaml)."
        ]
    if num_processes < 2 and kind == "MULTI_GPU":
        return [
            f"{path}: distributed_type: MULTI_GPU needs at least 2 processes, got {num_processes}. Use single_gpu."
        ]
    return []


def launch(verb: str, arguments: list[str], launch_arguments: LaunchArguments) -> None:
    """Replace this process by `accelerate launch --config_file ... -m dlm_tune VERB ...`. Does not return."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_arguments.config_file)]
    command += [token for pair in launch_arguments.flags for token in pair]
    command += ["-m", "dlm_tune", verb, *arguments]
    environment = {**os.environ, EXPECTED_PROCESSES: str(launch_arguments.num_processes)}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)


def check_processes() -> None:
    """Check that as many processes run as the launcher was asked for.

    Raises:
        OSError: accelerate started fewer.
    """
    from accelerate import PartialState

    state = PartialState()
    asked = {"WORLD_SIZE": os.environ.get("WORLD_SIZE"), "--accelerate_config": os.environ.get(EXPECTED_PROCESSES)}
    faults = [
        f"{source} asks for {number} processes, but {state.num_processes} run ({state.distributed_type.value})."
        for source, number in asked.items()
        if number is not None and int(number) != state.num_processes
    ]
    if faults:
        raise OSError(
            "\n".join(faults) + "\nTwo processes on CPUs need distributed_type: MULTI_GPU and use_cpu: false in the "
            "accelerate configuration, and use_cpu: true in the recipe: see "
            "accelerate_configs/cpu_two_processes.yaml."
        )


def check_parallelism(distributed_type: str) -> None:
    """Check that DeepSpeed or FSDP really runs where the launcher was asked for it.

    Args:
        distributed_type: `accelerator.distributed_type.value` of the trainer.

    Raises:
        OSError: accelerate fell back to plain data parallelism, as it does with `use_cpu`.
    """
    for variable, expected in (("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(variable, "").lower() == "true" and distributed_type != expected:
            raise OSError(
                f"The accelerate configuration asks for {expected}, but {distributed_type} runs: accelerate drops it "
                "on CPUs. For ZeRO on CPUs set `deepspeed: FILE.json` in the recipe and launch with cpu_two_processes."
            )


def leave(code: int) -> NoReturn:
    """End the program; as one process of several, without taking the interpreter apart.

    Native threads of torch's process groups and of Arrow live until then, and now and then abort a process that has
    finished: the launcher would report the run as failed. What is registered with atexit runs as always.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
