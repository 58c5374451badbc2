"""ZeRO-3 gathers the head at each call: ranks with different numbers of targets must not wait for each other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.models.score_under_zero3 import row
from tests.tiny_models import tiny_llada

ROOT = Path(__file__).parents[2]


def two_dense_steps() -> list[float]:
    """The same two SGD steps in one process, with dense logits and gradients averaged over both ranks' sums."""
    model, tokens, losses = tiny_llada().train(), row()[None], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(input_ids=tokens).logits[0], tokens[0], reduction="sum") / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.slow
def test_uneven_ranks_score_as_one_process(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.skip("DeepSpeed compiles its CPU communication: needs g++ and ninja")
    module = ["-m", "tests.models.score_under_zero3", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("LOSSES")]
    losses = json.loads(line.removeprefix("LOSSES"))
    assert losses == pytest.approx(two_dense_steps(), rel=1e-5)
