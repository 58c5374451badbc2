"""A merge holds one file of weights and not the model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

import pytest

from dlm_tune.models import load_model, merge_adapter
from tests.models.test_merge import LINEAR, lora, make_adapter
from tests.tiny_models import save_tiny_checkpoint

ROOT = Path(__file__).parents[2]
SHAPES = {"d_model": 512, "n_layers": 16, "n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": 1536}


@pytest.mark.slow
def test_merge_takes_the_memory_of_one_file(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", **SHAPES)
    make_adapter(base, tmp_path / "adapter", lora(target_modules=LINEAR))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.models.test_merge_memory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout.splitlines()[-1])
    size = (base / "model.safetensors").stat().st_size
    assert size > 200e6
    assert grown["merge_adapter"] < 0.4 * size
    assert grown["merge_and_unload"] > size  # so the measurement sees what it should


def grown_by(work: object) -> int:
    """Largest growth of this process's anonymous memory in bytes while a function runs."""
    start, done = anonymous_memory(), Event()
    largest = [start]

    def watch() -> None:
        while not done.is_set():
            largest[0] = max(largest[0], anonymous_memory())
            time.sleep(0.002)

    thread = Thread(target=watch)
    thread.start()
    work()  # type: ignore[operator]
    done.set()
    thread.join()
    return largest[0] - start


def anonymous_memory() -> int:
    """Bytes of this process that are no pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def main(folder: Path) -> None:
    """Merge both ways, the frugal one first."""

    def whole() -> None:
        model = load_model(folder / "base", dtype="float32", adapter=folder / "adapter").merge_and_unload()
        model.save_pretrained(folder / "whole")

    streamed = grown_by(lambda: merge_adapter(folder / "adapter", folder / "streamed", max_shard_size="20MB"))
    print(json.dumps({"merge_adapter": streamed, "merge_and_unload": grown_by(whole)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
