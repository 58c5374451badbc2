"""Checkpoints and final weights on disk: written whole beside what is there, then renamed.

Whatever interrupts a write (a kill, a full disk, a power cut), the folders of the run hold either the old files or the
new ones, and `checkpoint-*` names whole checkpoints only.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from trl import SFTTrainer

from dlm_tune.models import write_adapter_facts

# Where a run writes before it renames. A name that begins with "_" is left out of pushes to the Hub, and one that does
# not begin with "checkpoint" is never taken for one.
INCOMPLETE_FOLDER = "_dlm-tune-incomplete"

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What safetensors (Rust) says, and what torch.save (C++) says of any failed write
_FULL_DISK_WORDS = (*(f"os error {number}" for number in _FULL_DISK), "inline_container.cc")


class SavingTrainer(SFTTrainer):
    """An SFTTrainer whose checkpoints and final weights appear on disk only when they are whole.

    `save_total_limit` removes older checkpoints after the new one is in place, and keeps the best one by
    `metric_for_best_model`.
    """

    _incomplete: Path | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; what a killed run left half-written in `output_dir` is removed first."""
        self._clear(Path(self.args.output_dir) / INCOMPLETE_FOLDER)
        return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write weights, config and tokenizer into a folder, replacing those that are there only by whole files.

        Args:
            output_dir: by default that of the arguments.

        Raises:
            OSError: the disk is full; what the folder held is intact.
        """
        if self._incomplete is not None:  # a part of `_save_checkpoint`
            super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(output_dir or self.args.output_dir)
        with self._written_beside(folder, self._num_bytes()) as incomplete:
            super().save_model(str(incomplete), _internal_call=True)
        self._rename(incomplete, folder, replace_files)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, written beside its place; rotation and pushing see it when it is there."""
        run_folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        push_to_hub, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            with self._written_beside(run_folder, self._num_bytes(with_optimizer=True)) as incomplete:
                super()._save_checkpoint(model, trial)
                self._name_best_checkpoint(run_folder, incomplete / name)
        finally:
            self.args.push_to_hub = push_to_hub
        self._rename(incomplete / name, run_folder / name, replace_folder)
        self._clear(incomplete)
        if push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_folder), self.args.save_total_limit, best, use_mtime=True)

    def _name_best_checkpoint(self, run_folder: Path, written: Path) -> None:
        """Correct `best_model_checkpoint`, which the Trainer looks up where it writes."""
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best == written.name or (run_folder / best).is_dir()):
            self.state.best_model_checkpoint = str(run_folder / best)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._incomplete or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) and self.args.should_save:
            write_adapter_facts(output_dir or self.args.output_dir, model.config)

    @contextmanager
    def _written_beside(self, folder: Path, num_bytes: int) -> Iterator[Path]:
        """An empty folder in `folder` that all processes write into; it is removed if they cannot.

        Raises:
            OSError: the disk is full.
        """
        incomplete = folder / INCOMPLETE_FOLDER
        self._clear(incomplete)
        self._incomplete = incomplete
        try:
            yield incomplete
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                flush_to_disk(incomplete)
        except BaseException as error:
            shutil.rmtree(incomplete, ignore_errors=True)
            if is_full_disk(error):
                raise full_disk_error(folder, num_bytes, f"step {self.state.global_step}") from error
            raise
        finally:
            self._incomplete = None

    def _rename(self, source: Path, target: Path, replace: Any) -> None:
        """Put in place what all processes have written; nodes with disks of their own each do so."""
        if self.args.should_save and source.is_dir():
            replace(source, target)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and source.is_dir():
            replace(source, target)

    def _clear(self, incomplete: Path) -> None:
        if self.args.local_process_index == 0:
            shutil.rmtree(incomplete, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _num_bytes(self, with_optimizer: bool = False) -> int:
        """Bytes that this process's share of a checkpoint takes on disk, but for the small files."""
        model = self.accelerator.unwrap_model(self.model)
        tensors = [p for p in model.parameters() if p.requires_grad or not isinstance(model, PeftModel)]
        if with_optimizer and not self.args.save_only_model:
            state = getattr(self.optimizer, "state", None) or {}
            tensors += [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder to a name that may be taken; what had the name is removed afterwards."""
    replaced = source.with_name(f"{source.name}.replaced")
    if target.exists():
        os.replace(target, replaced)
    os.replace(source, target)
    shutil.rmtree(replaced, ignore_errors=True)


def replace_files(source: Path, target: Path) -> None:
    """Move the entries of a folder into another by renaming, and remove the emptied folder.

    The index of sharded weights goes first and comes last: shards of two states are never taken for one model.
    """
    target.mkdir(parents=True, exist_ok=True)
    entries = sorted(source.iterdir(), key=lambda path: path.name == SAFE_WEIGHTS_INDEX_NAME)
    names = {path.name for path in entries}
    is_model = any(name.startswith("model") and name.endswith(".safetensors") for name in names)
    stale = [path for path in target.glob("model*.safetensors*") if is_model and path.name not in names]
    if is_model:
        (target / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    for path in entries:
        if path.name == SAFE_WEIGHTS_INDEX_NAME:
            remove_files(stale)
        if path.is_dir():
            replace_folder(path, target / path.name)
        else:
            os.replace(path, target / path.name)
    remove_files(stale)
    source.rmdir()


def remove_files(paths: list[Path]) -> None:
    """Remove files that may be gone already."""
    for path in paths:
        path.unlink(missing_ok=True)


def flush_to_disk(folder: Path) -> None:
    """Wait until all files are on the disk: a rename alone could survive a power cut without their contents."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for lack of space, of quota, or of allowed file size."""
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return True
    return any(words in str(error) for words in _FULL_DISK_WORDS)


def full_disk_error(folder: Path, num_bytes: int, place: str) -> OSError:
    """The error that says what did not fit, and what is still there."""
    kept = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: path.stat().st_mtime)
    intact = ", ".join(path.name for path in kept) or "what the folder held before"
    return OSError(
        errno.ENOSPC,
        f"the disk of output_dir={folder} is full at {place}: about {num_bytes / 1e6:,.1f} MB are to be written and "
        f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free (or a quota is used up). What was half-written is "
        f"removed; intact: {intact}. Free space, or set save_total_limit or save_only_model, then continue with "
        "--resume_from_checkpoint last",
    )
