import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.conftest import trained_adapter  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_an_adapter_goes_to_a_hub_and_comes_back(trained_adapter, tmp_path):  # noqa: F811
    command = [sys.executable, "examples/share/share.py", "--adapter", str(trained_adapter), "--canvas", "4"]
    options = ["--output_dir", str(tmp_path / "share"), "--prompt", "a: ", "--prompt", "b: "]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The model that came back gives the same 2 answers" in done.stdout
    adapter, shared = ((tmp_path / "share" / f"{name}.jsonl").read_text() for name in ("adapter", "shared"))
    assert adapter == shared
    assert "Would be pushed to user/inflection" in done.stdout
