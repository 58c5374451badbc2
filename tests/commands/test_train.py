"""Where a run may write, and what it can go on from."""

from pathlib import Path

import pytest

from dlm_tune.cli import main
from dlm_tune.commands.train import prepare_output_dir
from dlm_tune.trainers import DiffusionConfig
from dlm_tune.trainers.saving import INCOMPLETE_FOLDER
from tests.commands.test_inspect_batch import workspace


def prepare(folder: Path, overwrite: bool = False, is_adapter: bool = True, resume: str | None = None) -> str | None:
    config = DiffusionConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", resume_from_checkpoint=resume
    )
    return prepare_output_dir(config, overwrite, is_adapter)


def write_checkpoint(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", *names):
        (folder / name).touch()
    return folder


def test_last_is_the_newest_checkpoint_that_was_written_to_its_end(tmp_path, capsys):
    for number in (8, 9, 10):
        write_checkpoint(tmp_path / f"checkpoint-{number}", "optimizer.pt", "trainer_state.json")
    half = write_checkpoint(tmp_path / "checkpoint-11", "optimizer.pt")  # the trainer's state is written last
    assert prepare(tmp_path, resume="last") == str(tmp_path / "checkpoint-10")
    assert f"{half} was not written to its end" in capsys.readouterr().out


def test_overwriting_removes_half_written_checkpoints_too(tmp_path):
    half = write_checkpoint(tmp_path / "checkpoint-11")
    foreign = tmp_path / "checkpoint-notes"
    foreign.mkdir()
    assert prepare(tmp_path, overwrite=True) is None
    assert not half.exists()
    assert foreign.exists()


@pytest.mark.parametrize("names", [(), ("optimizer.pt",)])
def test_only_a_half_written_checkpoint_is_nothing_to_go_on_from(tmp_path, names):
    write_checkpoint(tmp_path / "checkpoint-1", *names)
    with pytest.raises(ValueError, match=r"no checkpoint-. folder in output_dir=.* that was written to its end"):
        prepare(tmp_path, resume="last")


def test_weights_without_the_optimisers_state_are_nothing_to_go_on_from(tmp_path):
    write_checkpoint(tmp_path / "run", "trainer_state.json")  # a finished run, or a checkpoint of save_only_model
    with pytest.raises(ValueError, match="has no state of the optimiser"):
        prepare(tmp_path, resume=str(tmp_path / "run"))


def test_what_a_run_killed_in_its_first_write_left_is_no_obstacle(tmp_path):
    write_checkpoint(tmp_path / INCOMPLETE_FOLDER / "checkpoint-5", "model.safetensors")
    assert prepare(tmp_path) is None
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        prepare(tmp_path)


@pytest.mark.parametrize(("is_adapter", "other"), [(True, "config.json"), (False, "adapter_config.json")])
def test_adapter_and_full_model_do_not_share_a_folder(tmp_path, is_adapter, other):
    """Otherwise `generate` would load whichever file it looks for first."""
    (tmp_path / other).touch()
    with pytest.raises(ValueError, match="which of the two is loaded later would be unclear"):
        prepare(tmp_path, overwrite=True, is_adapter=is_adapter)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--unpaired_dataset", "nothing.txt"], "unpaired_dataset='nothing.txt'"),
        (["--unpaired_dataset", "text.txt", "--packing", "true"], "packing=True does not go with an unpaired_dataset"),
        (["--unpaired_dataset", "text.txt", "--train_sampling_strategy", "group_by_length"], "does not go with"),
        (["--guidance_keep_tokens", "<bos>"], "guidance_keep_tokens=['<bos>'] names ['<bos>']"),
        (["--prompt_dropout", "0.1", "--completion_only_loss", "false"], "prompt_dropout=0.1 has no effect where"),
    ],
)
def test_faults_of_guidance_are_found_before_weights_are_loaded(tmp_path, monkeypatch, capsys, flags, words):
    recipe = workspace(tmp_path)
    (tmp_path / "text.txt").write_text("abc\n")
    (tmp_path / "model" / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["sft", "--config", recipe, *flags]) == 2
    assert words in capsys.readouterr().err
