"""The progress bar of training, and one short line a log entry; every figure is in `trainer_state.json`."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

# key of the log -> how it is written; keys that an entry lacks are left out
_LINE = {
    "loss": "loss {:.4f}",
    "nelbo": "nelbo {:.4f}",
    "masked_accuracy": "accuracy {:.3f}",
    "grad_norm": "gradient {:.3g}",
    "learning_rate": "lr {:.3g}",
    "num_tokens": "tokens {:.3g}",
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
