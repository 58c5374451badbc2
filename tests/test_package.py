"""The built wheel holds everything, and works where there is no checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from dlm_tune.commands.arguments import VERBS

ROOT = Path(__file__).parent.parent
SHARED_FOLDERS = ("recipes", "accelerate_configs", "models")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ".", cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` folder of a fresh environment with the wheel, and this environment's other packages at hand.

    The other packages come in by a .pth line; .pth files inside an added folder are not read, so the editable
    dlm-tune of this environment stays out.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True, with_pip=False)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    run(
        sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install",
        "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel, cwd=folder,
    )  # fmt: skip
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def tracked_files(*folders: str) -> set[str]:
    """Files of the checkout that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return {name for name in names if (ROOT / name).is_file()}


def test_the_wheel_holds_the_package_and_what_ships_with_it(wheel):
    contents = set(zipfile.ZipFile(wheel).namelist())
    modules = tracked_files("dlm_tune")
    shared = {f"dlm_tune/share/{name}" for name in tracked_files(*SHARED_FOLDERS)}
    assert "dlm_tune/diffusion/losses.py" in modules
    assert {name.split("/")[2] for name in shared} == set(SHARED_FOLDERS)
    rest = {name for name in contents if not name.startswith("dlm_tune-")}
    assert rest == modules | shared
    assert wheel.stat().st_size < 10 * 2**20


def test_every_submodule_of_the_installed_wheel_imports(installed, tmp_path):
    script = """
import importlib, pkgutil, sys
import dlm_tune
names = [m.name for m in pkgutil.walk_packages(dlm_tune.__path__, "dlm_tune.") if m.name != "dlm_tune.__main__"]
for name in names:
    importlib.import_module(name)
print(dlm_tune.__file__, len(names))
"""
    file, count = run(installed / "python", "-c", script, cwd=tmp_path).split()[-2:]
    assert Path(file).is_relative_to(installed.parent), "the checkout's package was imported instead of the wheel's"
    sources = [name for name in tracked_files("dlm_tune") if name.endswith(".py")]
    packages = sum(name.endswith("__init__.py") for name in sources) - 1
    modules = sum(not name.endswith(("__init__.py", "__main__.py")) for name in sources)
    assert int(count) == packages + modules


def test_the_entry_points_answer(installed, tmp_path):
    listing = run(installed / "dlm-tune", "--help", cwd=tmp_path)
    for verb in VERBS:
        assert verb in listing
    assert run(installed / "python", "-m", "dlm_tune", "--help", cwd=tmp_path) == listing


def test_a_shipped_recipe_trains_by_name(installed, tmp_path):
    """Two steps of the quickstart's recipe on rows of one's own: recipe and base checkpoint come from the wheel."""
    rows = "".join(f'{{"prompt": "past of walk{i}: ", "completion": "walked"}}\n' for i in range(8))
    (tmp_path / "rows.jsonl").write_text(rows)
    run(
        installed / "dlm-tune", "sft", "--config", "quickstart/sft/lora",
        "--datasets", '[{"path": "rows.jsonl"}]', "--eval_dataset_name", "rows.jsonl",
        "--max_steps", "2", "--per_device_train_batch_size", "4", "--warmup_steps", "0", "--output_dir", "out",
        cwd=tmp_path, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    answer = run(
        installed / "dlm-tune", "generate", "--model_name_or_path", "out", "--prompt", "past of walk: ",
        "--max_new_tokens", "6", "--block_length", "6", "--steps", "2", cwd=tmp_path, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert answer.strip()
