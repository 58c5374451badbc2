"""What the trainer says of attention that is annealed (see `models.annealing`)."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from dlm_tune.models.annealing import right_context_share
from dlm_tune.trainers.diffusion_config import DiffusionConfig

logger = logging.getLogger(__name__)


class AnnealingWarning(TrainerCallback):
    """Says when a run is over before attention is bidirectional; a trial of few steps may be."""

    def on_train_begin(  # type: ignore[override]
        self, args: DiffusionConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the steps of annealing with those of the run."""
        annealing_steps = args.attention_annealing_steps or 0
        if annealing_steps > state.max_steps and state.is_world_process_zero:
            logger.warning(
                "attention_annealing_steps=%d is more than the %d steps of this run: at its end tokens have seen "
                "%.0f%% of those behind them at most, but evaluation and sampling show them all. Lower it, or train "
                "longer.",
                annealing_steps,
                state.max_steps,
                100 * right_context_share(state.max_steps - 1, annealing_steps),
            )


def annealing_figures(args: DiffusionConfig, num_steps: int) -> dict[str, float]:
    """Return `attention_right_context` for the log: the share at the last of `num_steps` steps. Empty without it."""
    if not args.attention_annealing_steps:
        return {}
    return {"attention_right_context": right_context_share(num_steps - 1, args.attention_annealing_steps)}
