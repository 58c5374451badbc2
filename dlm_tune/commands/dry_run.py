"""Training recipes in the hands of verbs that do not train."""

from typing import Any

from dlm_tune.recipe import Recipe


def leave_nothing_behind(recipe: Recipe, folder: str, *, place: str, **overrides: Any) -> None:
    """Turn a training recipe into one that writes to `folder` only, for verbs that use it without training.

    Args:
        recipe: changed in place.
        folder: a temporary directory, in place of `output_dir`.
        place: what messages name as the source of the values.
        overrides: further keys to set.
    """
    values = {
        "output_dir": folder,
        "report_to": "none",
        "push_to_hub": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        **overrides,
    }
    for name, value in values.items():
        recipe.set(name, value, place=place)
