"""ZeRO-3 divides weights and optimiser among processes: its checkpoints are whole, and runs go on from them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import tiny_llada

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_full_models_and_adapters_are_saved_and_resumed_under_zero3(tmp_path):
    pytest.importorskip("deepspeed")
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.skip("DeepSpeed compiles its CPU communication: needs g++ and ninja")
    module = ["-m", "tests.trainers.save_under_zero", str(tmp_path), "3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *module]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for kind, file in (("full", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        whole, resumed = json.loads((tmp_path / kind / "losses.json").read_text())
        assert resumed == whole
        assert len(whole) == 4
        runs = [tmp_path / kind / name for name in ("whole", "resumed")]
        for folder in runs:
            assert [path.name for path in folder.iterdir() if path.is_dir()] == ["checkpoint-4"]
            state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
            assert state["best_model_checkpoint"] == str(folder / "checkpoint-4")
        final, again, last = (load_file(folder / file) for folder in (*runs, runs[0] / "checkpoint-4"))
        assert final.keys() == again.keys() == last.keys()
        assert all(torch.equal(final[name], again[name]) and torch.equal(final[name], last[name]) for name in final)
        assert all(tensor.numel() for tensor in final.values())
    tiny_llada().save_pretrained(tmp_path / "untrained")
    untrained, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("untrained", "full/whole"))
    assert {name: tensor.shape for name, tensor in trained.items()} == {k: v.shape for k, v in untrained.items()}
