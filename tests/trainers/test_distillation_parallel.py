"""Distilled guidance where weights are replicated or sharded over two gloo processes equals one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRAPPINGS = ["ddp", "fsdp2_root", "fsdp2_layers", "fsdp2_resharded"]


def run(processes, *arguments):
    command = ["-m", "tests.trainers.distil_in_two_processes", *map(str, arguments)]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


def test_an_adapter_is_trained_however_the_model_is_wrapped():
    """With unequal numbers of targets, none on one rank; peft freezes the adapter for the teacher's forward."""
    differences = run(2, "wrappings", *WRAPPINGS)
    assert list(differences) == WRAPPINGS
    assert max(differences.values()) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind"), [(2, "full"), (2, "adapter"), (3, "adapter")])
def test_zero_equals_one_process(tmp_path, stage, kind):
    pytest.importorskip("deepspeed")
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.skip("DeepSpeed compiles its CPU communication: needs g++ and ninja")
    losses, expected = run(2, "zero", stage, kind, tmp_path / "two"), run(1, "zero", 0, kind, tmp_path / "one")
    assert len(expected) == 3
    assert losses == pytest.approx(expected, rel=1e-5)
