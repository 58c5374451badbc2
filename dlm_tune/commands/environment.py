"""`dlm-tune env`: versions, devices, and what is missing. Never prints secrets."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dlm_tune import __version__
from dlm_tune.recipe import RecipeError

# Distribution -> what to type where it is missing
_PACKAGES = {
    "torch": "pip install torch",
    "transformers": "pip install dlm-tune",
    "trl": "pip install dlm-tune",
    "peft": "pip install dlm-tune",
    "accelerate": "pip install dlm-tune",
    "datasets": "pip install dlm-tune",
    "huggingface_hub": "pip install dlm-tune",
    "tokenizers": "pip install dlm-tune",
    "safetensors": "pip install dlm-tune",
    "deepspeed": "pip install 'dlm-tune[deepspeed]'  (ZeRO)",
    "bitsandbytes": "pip install 'dlm-tune[bitsandbytes]'  (load_in_4bit, load_in_8bit)",
    "lm_eval": "pip install 'dlm-tune[eval]'  (eval --tasks)",
    "lemminflect": "pip install 'dlm-tune[quickstart]'  (the quickstart's data)",
}
# Of variables that may hold a secret, only whether they are set.
_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "WORLD_SIZE",
)
_SECRETS = ("HF_TOKEN", "HF_ENDPOINT", "WANDB_API_KEY")


def run_environment(arguments: list[str]) -> None:
    """Print the report as text, or as JSON with `--json`.

    Raises:
        RecipeError: any other argument.
    """
    unknown = [argument for argument in arguments if argument != "--json"]
    if unknown:
        raise RecipeError([f"'{unknown[0]}': only --json is known."], "the command line of `dlm-tune env`")
    report = collect()
    if arguments:
        print(json.dumps(report, indent=2))
        return
    for title, values in report.items():
        print(f"{title}:")
        for name, value in values.items():
            print(f"  {name:<24}{value}")


def collect() -> dict[str, dict[str, Any]]:
    """Sections of the report: name -> value."""
    import torch

    packages = {"dlm_tune": __version__}
    for name, remedy in _PACKAGES.items():
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = f"missing: {remedy}"
    machine: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "accelerator": str(torch.accelerator.current_accelerator() or "none"),
        "CUDA of this torch": torch.version.cuda or "none (CPU build)",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        machine[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        machine["bf16 on the GPU"] = torch.cuda.is_bf16_supported()
    environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    environment |= {name: "set" if os.environ.get(name) else "not set" for name in _SECRETS}
    return {"packages": packages, "machine": machine, "environment": environment}
