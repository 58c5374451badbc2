import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from dlm_tune.commands.train import prepare_output_dir
from dlm_tune.models import load_model
from dlm_tune.trainers.saving import INCOMPLETE_FOLDER, flush_to_disk, full_disk_error, is_full_disk, replace_files
from tests.tiny_models import tiny_llada
from tests.trainers.interrupted_saves import make_trainer
from tests.trainers.test_diffusion_trainer import PAIRS, losses
from tests.trainers.test_diffusion_trainer import make_trainer as make_evaluated_trainer

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of the interrupted runs, and what they reported."""
    folder = tmp_path_factory.mktemp("interrupted")
    command = [sys.executable, "-m", "tests.trainers.interrupted_saves", str(folder)]
    may_mount = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"]).returncode == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*(["unshare", "-rm"] if may_mount else []), *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_run_killed_in_a_write_goes_on_from_the_checkpoint_before(interrupted, tmp_path):
    folder, results = interrupted
    run = folder / "killed"
    assert results["killed"] == -9
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]  # kept although save_total_limit=1
    assert (run / INCOMPLETE_FOLDER / "checkpoint-4" / "model.safetensors").is_file()  # it was in the middle
    whole = make_trainer(tmp_path)
    whole.train()
    resumed = make_trainer(run, resume_from_checkpoint="last")
    resumed.train(resume_from_checkpoint=prepare_output_dir(resumed.args, overwrite=False, is_adapter=False))
    assert losses(resumed) == losses(whole)
    assert not (run / INCOMPLETE_FOLDER).exists()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]


def test_limit_on_file_sizes_leaves_the_weights_of_before(interrupted):
    folder, results = interrupted
    result = results["limit"]
    assert result["step"] == 2
    assert result["weights_intact"]
    assert not [name for name in result["names"] if name.startswith(("checkpoint", "_"))]
    for error in result["errors"]:  # of the checkpoint and of the final save
        assert f"the disk of output_dir={folder / 'limit'} is full at step 2: about" in error
        assert "MB are free" in error
        assert "intact: what the folder held before" in error


def test_full_disk_leaves_the_checkpoint_of_before(interrupted):
    folder, results = interrupted
    if "disk" not in results:
        pytest.skip("no right to mount a tmpfs, which is the full disk of this test")
    result = results["disk"]
    assert result["weights_intact"] is False  # room for the weights alone is left
    assert result["step"] == 4
    assert "checkpoint-2" in result["names"]
    assert not [name for name in result["names"] if name.startswith("_")]
    [error] = result["errors"]
    assert f"output_dir={folder / 'disk'} is full at step 4" in error
    assert "intact: checkpoint-2" in error


def test_full_disk_is_told_from_other_faults(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(RuntimeError) as raised:
        torch.save({"weights": torch.zeros(1000)}, full)
    assert is_full_disk(raised.value)
    assert not is_full_disk(RuntimeError("the rows differ"))
    assert not is_full_disk(PermissionError(13, "no"))
    assert "about 2.0 MB are to be written" in str(full_disk_error(tmp_path, 2_000_000, "step 3"))
    flush_to_disk(tmp_path)


class Spoil(TrainerCallback):
    """Makes the model worse from the fourth step on."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > 3:
            for parameter in model.parameters():
                parameter.data *= 2


def test_best_checkpoint_is_kept_and_its_name_recorded(tmp_path):
    trainer = make_evaluated_trainer(
        tmp_path,
        eval_rows=PAIRS,
        max_steps=6,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        metric_for_best_model="nelbo",
        callbacks=[Spoil()],
    )
    trainer.train()
    nelbos = [entry["eval_nelbo"] for entry in trainer.state.log_history if "eval_nelbo" in entry]
    best = 1 + nelbos.index(min(nelbos))
    assert best == 3, nelbos  # an earlier one than the last two
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{best}", "checkpoint-6"]
    for checkpoint in tmp_path.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
        assert state["best_metric"] == min(nelbos)


@pytest.mark.parametrize("sizes", [("40KB", "5GB"), ("5GB", "40KB"), ("40KB", "60KB")])
def test_weights_in_other_shards_replace_those_of_before(tmp_path, sizes):
    old, new = tiny_llada(seed=1), tiny_llada(seed=2)
    target, source = tmp_path / "run", tmp_path / "run" / "new"
    old.save_pretrained(target, max_shard_size=sizes[0])
    (target / "adapter_model.safetensors").write_bytes(b"another model's")
    new.save_pretrained(source, max_shard_size=sizes[1])
    expected = {path.name for path in source.iterdir()} | {"adapter_model.safetensors"}
    replace_files(source, target)
    assert {path.name for path in target.iterdir()} == expected
    loaded = load_model(target, dtype="float32").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in new.state_dict().items())


@pytest.mark.parametrize("fixture", ["llada_tiny_ref", "dream_tiny_ref"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_weights_have_the_names_and_shapes_of_the_authors_files(tmp_path, fixture, dtype):
    trainer = make_evaluated_trainer(tmp_path, load_model(FIXTURES / fixture, dtype=dtype), learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    published, saved = load_file(FIXTURES / fixture / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {k: v.shape for k, v in published.items()}
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}
    assert any(not torch.equal(tensor.float(), published[name]) for name, tensor in saved.items())
