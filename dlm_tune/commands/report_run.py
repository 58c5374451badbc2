"""What a training run left on disk, as `dlm-tune report` shows it: log, results, recipe without secrets."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dlm_tune.recipe_yaml import RecipeLoader, dump_yaml

STATE_FILE = "trainer_state.json"
REDACTED = "(not shown)"

_SECRET_KEY = re.compile(
    r"(token|(secret|password|passwd|passphrase|credential|authorization|(api|access|private)_?key)s?)$"
)
_TEXT_TOKENS = {"eos_token", "pad_token", "bos_token", "mask_token", "unk_token", "sep_token", "cls_token"}
_SECRET_TEXT = [(re.compile(r"\bhf_[A-Za-z0-9]{16,}"), REDACTED), (re.compile(r"(?<=://)[^/\s@]+@"), f"{REDACTED}@")]


@dataclass(frozen=True)
class Series:
    """A logged quantity: value `values[i]` at step `steps[i]`, all finite."""

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: what tells it from the other runs of the report.
        folder: its `output_dir`.
        state_file: the `trainer_state.json` that the log was read from.
        step: optimiser steps done.
        max_steps: optimiser steps planned; 0 if unknown.
        log: entries of the log in their order, each with `step`; numbers only.
        results: `results.json`, empty if there is none.
        recipe: keys of `recipe.yaml` with secrets blanked, empty if there is none.
        notes: what a reader must know about the files.
    """

    name: str
    folder: Path
    state_file: Path
    step: int
    max_steps: int
    log: list[dict[str, float]]
    results: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether the trainer wrote the closing entry of its log."""
        return any("train_runtime" in entry for entry in self.log)

    @property
    def recipe_text(self) -> str:
        """The recipe as YAML, without secrets."""
        return dump_yaml(self.recipe) if self.recipe else ""

    def quantities(self) -> set[str]:
        """Names of all quantities of the log and of the evaluations before and after."""
        return {key for entry in [*self.log, *(metrics for _, metrics in self.evaluations())] for key in entry}

    def series(self, key: str) -> Series:
        """A quantity of the training log."""
        points = [(int(entry["step"]), entry[key]) for entry in self.log if math.isfinite(entry.get(key, math.nan))]
        return Series([step for step, _ in points], [value for _, value in points])

    def evaluations(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Step and metrics of all evaluations: before training (step 0), in the log, and after it."""
        by_step: dict[int, dict[str, float]] = {}
        for entry in self.log:
            if any(key.startswith("eval_") for key in entry):  # each evaluation data set has an entry of its own
                by_step.setdefault(int(entry["step"]), {}).update(entry)
        for when, step in (("before", 0), ("after", self.step)):
            metrics = numbers_of(self.results.get(when))
            if metrics:
                by_step.setdefault(step, metrics)
        yield from sorted(by_step.items())

    def evaluation_series(self, key: str) -> Series:
        """A quantity of the evaluations."""
        points = [(step, part[key]) for step, part in self.evaluations() if math.isfinite(part.get(key, math.nan))]
        return Series([step for step, _ in points], [value for _, value in points])

    def tokens_per_second(self) -> float | None:
        """Mean over the run, evaluations left out; None where the log cannot tell.

        From the logged rates, each weighed by its seconds. Logs without them have only the seconds of the closing
        entry, and after a resume those are of the last part, while the tokens are of all parts.
        """
        logged = [entry for entry in self.log if entry.get("tokens_per_second", 0) > 0 and "num_tokens" in entry]
        if logged:
            counts = [0.0, *(entry["num_tokens"] for entry in logged)]
            pairs = zip(pairwise(counts), logged, strict=True)
            return counts[-1] / sum((now - before) / entry["tokens_per_second"] for (before, now), entry in pairs)
        seconds = sum(entry.get("train_runtime", 0.0) for entry in self.log)
        seconds -= sum(entry.get("eval_runtime", 0.0) for entry in self.log)
        tokens = self.series("num_tokens")
        if seconds <= 0 or not len(tokens) or self.recipe.get("resume_from_checkpoint"):
            return None
        return tokens.values[-1] / seconds


def read_runs(folders: list[Path]) -> list[Run]:
    """Read runs, with names that tell them apart.

    Raises:
        ValueError: the faults of all folders, one a line.
    """
    runs, faults = [], []
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        try:
            runs.append(read_run(folder, name))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return runs


def read_run(folder: Path, name: str) -> Run:
    """Read one run.

    Raises:
        ValueError: no run in the folder, or a file of it that cannot be read.
    """
    candidates = _find_states(folder)
    state_file, state = _newest(candidates)
    log = [numbers_of(entry) for entry in state["log_history"]]
    log = [entry for entry in log if math.isfinite(entry.get("step", math.nan))]
    figures = [value for entry in log for key, value in entry.items() if key not in ("step", "epoch")]
    log = [entry for entry in log if len(entry.keys() - {"step", "epoch"})]
    if not any(map(math.isfinite, figures)):
        raise ValueError(
            f"{state_file}: the log is empty or holds no finite number, so there is nothing to show yet. Entries are "
            "written every logging_steps steps."
        )
    notes = []
    results, recipe = _read_json(folder / "results.json"), _read_recipe(folder / "recipe.yaml")
    if state_file.parent != folder:
        notes.append(f"Read from {state_file.parent.name}: the run had not ended when this report was written.")
        if folder / STATE_FILE in candidates:
            results, recipe = {}, {}
            notes.append("results.json and recipe.yaml are of an earlier run in the same folder and left out.")
    progress = numbers_of(state)
    dropped = sum(not math.isfinite(value) for entry in log for value in entry.values())
    if dropped:
        notes.append(f"{dropped} values of the log are not finite and not drawn.")
    return Run(
        name=name,
        folder=folder,
        state_file=state_file,
        step=int(progress.get("global_step", 0)),
        max_steps=int(progress.get("max_steps", 0)),
        log=log,
        results=results,
        recipe=recipe,
        notes=tuple(notes),
    )


def distinct_names(folders: list[Path]) -> list[str]:
    """Short names: the paths without the parts that all of them begin or end with."""
    parts = [folder.resolve().parts for folder in folders]
    if len(folders) == 1:
        return [_printable("/".join(parts[0][1:][-2:]) or str(folders[0]))]
    while len({part[0] for part in parts if part}) == 1 and all(len(part) > 1 for part in parts):
        parts = [part[1:] for part in parts]
    while len({part[-1] for part in parts if part}) == 1 and all(len(part) > 1 for part in parts):
        parts = [part[:-1] for part in parts]
    return [_printable("/".join(part)) for part in parts]


def redact(value: Any, key: str = "") -> Any:
    """A value of a recipe without secrets: what is stored under such a key, and what looks like one in a text."""
    name = key.lower()
    if _SECRET_KEY.search(name) and name not in _TEXT_TOKENS and value not in (None, "", False, True):
        return REDACTED
    if isinstance(value, dict):
        return {part: redact(inner, str(part)) for part, inner in value.items()}
    if isinstance(value, list):
        return [redact(inner, key) for inner in value]
    if isinstance(value, str):
        for pattern, replacement in _SECRET_TEXT:
            value = pattern.sub(replacement, value)
    return value


def _find_states(folder: Path) -> dict[Path, dict[str, Any]]:
    """The state of the run itself and of its checkpoints."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}. Give the output_dir of a training run.")
    paths = [path for path in [folder / STATE_FILE, *folder.glob(f"checkpoint-*/{STATE_FILE}")] if path.is_file()]
    if not paths:
        below = sorted({str(path.parent) for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{STATE_FILE}")})
        hint = f" Did you mean {' or '.join(below[:3])}?" if below else ""
        raise ValueError(
            f"{folder} holds no training run: there is neither {STATE_FILE} nor checkpoint-*/{STATE_FILE}.{hint} Both "
            "are written by `dlm-tune sft` and `dlm-tune pretrain`, the first one at the end of the run and the "
            "others with save_strategy: steps."
        )
    states = {}
    for path in paths:
        state = _read_json(path)
        history = state.get("log_history")
        if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
            raise ValueError(f"{path} has no log_history: it is not the state of a training run.")
        states[path] = state
    return states


def _newest(states: dict[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The state that was written last; a state whose log goes on from it wins, since copies lose their times."""
    newest = max(states, key=lambda path: (path.stat().st_mtime_ns, states[path].get("global_step") or 0))
    log = states[newest]["log_history"]
    longer = [path for path, state in states.items() if state["log_history"][: len(log)] == log]
    newest = max(longer, key=lambda path: (len(states[path]["log_history"]), path == newest))
    return newest, states[newest]


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not whole JSON ({error}). If the run is writing it just now, try again; otherwise remove it."
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__} and no object: it was not written by dlm-tune.")
    return value


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({error}). Mend or remove it.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe, a mapping of `key: value` lines. Mend or remove it.")
    return redact(values)


def numbers_of(entry: Any) -> dict[str, float]:
    """What of a log entry or of an evaluation is a number."""
    if not isinstance(entry, dict):
        return {}
    return {
        str(key): value
        for key, value in entry.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)
