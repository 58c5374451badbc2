"""The progress bar of training, and one short line a log entry; every figure is in `trainer_state.json`."""

import time
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# key of the log -> how it is written; keys that an entry lacks are left out
_LINE = {
    "loss": "loss {:.4f}",
    "nelbo": "nelbo {:.4f}",
    "masked_accuracy": "accuracy {:.3f}",
    "grad_norm": "gradient {:.3g}",
    "learning_rate": "lr {:.3g}",
    "tokens_per_second": "{:.3g} tokens/s",
    "eval_nelbo": "held-out nelbo {:.4f}",
    "eval_nelbo_standard_error": "± {:.4f}",
    "eval_masked_accuracy": "accuracy {:.3f}",
    "eval_runtime": "in {:.1f} s",
    "train_runtime": "trained in {:.1f} s",
    "train_steps_per_second": "{:.3g} steps/s",
}


class DiffusionProgressCallback(ProgressCallback):
    """Transformers' progress bar with the figures that matter in place of the whole dictionary."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write a line above the bar on the first process."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            figures = [text.format(float(logs[key])) for key, text in _LINE.items() if key in logs]
            self.training_bar.write(f"step {state.global_step}: " + "  ".join(figures))


class StepTimer(TrainerCallback):
    """Seconds spent in optimiser steps, their data included; evaluation and saving are not."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._seconds = 0.0
        self._num_tokens = 0.0

    def start(self) -> None:
        """Begin of a step, before its data are fetched."""
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End of a step."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def rate(self, num_tokens: float) -> float:
        """Tokens a second since the last call, given all tokens seen so far."""
        seen, seconds = num_tokens - self._num_tokens, self._seconds
        self._num_tokens, self._seconds = num_tokens, 0.0
        return seen / seconds if seconds else 0.0
