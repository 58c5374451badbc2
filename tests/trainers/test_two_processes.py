"""Real processes over gloo: the same global batch gives the same run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.train_tiny import VARIANTS

ROOT = Path(__file__).parents[2]


def train(output_dir, processes, batch_size, accumulation, variant):
    output_dir.mkdir(parents=True)
    command = ["-m", "tests.trainers.train_tiny", str(output_dir), str(batch_size), str(accumulation), variant]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output_dir / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {variant: train(folder / variant, 1, 8, 1, variant)[0] for variant in VARIANTS}


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "variant"),
    [(4, 1, "padded"), *((2, 2, variant) for variant in VARIANTS)],
)
def test_two_processes_equal_one(tmp_path, one_process, batch_size, accumulation, variant):
    one_process = one_process[variant]
    ranks = train(tmp_path / "out", 2, batch_size, accumulation, variant)
    assert [rank["num_processes"] for rank in ranks] == [2, 2]
    for ours, theirs in zip(ranks[0]["log"], one_process["log"], strict=True):
        for key in ("loss", "nelbo", "grad_norm", "masked_accuracy", "num_tokens", "fraction_masked"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key

    first, second = ranks[0]["noise"], ranks[1]["noise"]
    assert not set(first) & set(second), "the ranks train on different rows"
    assert first | second == one_process["noise"], "the union of the ranks' noise is that of one process"
    drawn = list(zip(first.values(), second.values(), strict=False))  # packed ranks have more or fewer rows
    assert sum(ours != theirs for ours, theirs in drawn) > len(drawn) / 2, "and the ranks do not draw the same"

    if variant == "padded":  # a checkpoint appears when both ranks have written their part, and nothing is left beside
        folder = tmp_path / "out"
        names = {path.name for path in (folder / "checkpoint-5").iterdir()}
        assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "trainer_state.json"} <= names
        assert not [path.name for path in folder.iterdir() if path.name.startswith("_")]

    # seven evaluation rows: the sampler repeats rows to fill the last batch, the metrics count each once
    assert ranks[0]["metrics"]["eval_num_rows"] == 7
    for key, value in one_process["metrics"].items():
        assert ranks[0]["metrics"][key] == pytest.approx(value, rel=1e-4), key
