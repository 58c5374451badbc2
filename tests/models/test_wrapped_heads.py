"""The head under DDP and FSDP2 in two gloo processes, with unequal numbers of targets, none on one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRAPPINGS = [
    f"{wrapping}{mode}"
    for wrapping in ("ddp", "fsdp2_root", "fsdp2_layers", "fsdp2_head")
    for mode in ("", "_frozen", "_unweighted", "_unweighted_frozen")
]


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    script = ["-m", "tests.models.score_in_two_processes", *WRAPPINGS]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("DIFFERENCES")]
    return json.loads(line.removeprefix("DIFFERENCES"))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_two_processes_equal_one_with_dense_logits(differences: dict[str, float], wrapping: str) -> None:
    assert differences[wrapping] < 5e-6
