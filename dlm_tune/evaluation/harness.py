"""Tasks of the lm-evaluation-harness on a diffusion language model.

The harness is an optional dependency (`dlm-tune[eval]`): it is imported when a task is run, not with this module.
"""

import difflib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlm_tune.evaluation.harness_model import DiffusionHarnessMethods

HARNESS_MODEL_NAME = "dlm_tune"


@functools.cache
def harness_model_class() -> type:
    """The harness's model class, registered as `dlm_tune`: `simple_evaluate(model="dlm_tune", model_args=...)`.

    Raises:
        ImportError: the lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ImportError(
            "tasks of the lm-evaluation-harness need the package lm_eval, which is not installed. "
            'Run: pip install "dlm-tune[eval]"'
        ) from error

    @register_model(HARNESS_MODEL_NAME)
    class DiffusionHarnessModel(DiffusionHarnessMethods, LM):
        """A diffusion language model as the harness sees it."""

    return DiffusionHarnessModel


def run_harness(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    gen_kwargs: dict[str, Any] | None = None,
    bootstrap_iters: int = 1000,
    **model_options: Any,
) -> dict[str, Any]:
    """Evaluate a model on tasks of the lm-evaluation-harness, in this process.

    Args:
        model: a model of `dlm_tune.load_model`, or a `PeftModel` of one.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups.
        include_path: directory with task YAML files of your own.
        limit: rows per task (a fraction if below 1); all if None.
        num_fewshot: examples in the prompt; the task's number if None.
        apply_chat_template: wrap prompts in the tokenizer's chat template.
        gen_kwargs: override the tasks' generation keys, e.g. `{"do_sample": True, "temperature": 0.5}`.
        bootstrap_iters: resamples for standard errors of metrics without a formula.
        **model_options: `generation_config`, `batch_size`, `num_samples`, `seed`, `check_greedy`, `max_length`,
            `rolling_stride`.

    Returns:
        The harness's dictionary: `["results"][task]` holds the metrics, `["samples"][task]` the rows.

    Raises:
        ImportError: the lm-evaluation-harness is not installed.
        ValueError: an unknown task, or options that cannot be honoured.
    """
    model_class = harness_model_class()
    import lm_eval

    task_manager = _task_manager(list(tasks), include_path)
    results = lm_eval.simple_evaluate(
        model=model_class(model, tokenizer, **model_options),
        tasks=list(tasks),
        task_manager=task_manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        gen_kwargs=gen_kwargs,
        bootstrap_iters=bootstrap_iters,
    )
    assert results is not None, "only other ranks of a distributed run get no results"
    return results


def _task_manager(tasks: list[str], include_path: str | Path | None) -> Any:
    """Index of your own tasks, and of the harness's many only when one of `tasks` is not yours."""
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    if path is not None:
        if not Path(path).is_dir():
            raise ValueError(f"include_path={path} is not a directory. Give the one that holds the task YAML files.")
        own = TaskManager(include_path=path, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=path)
    missing = [task for task in tasks if not manager.match_tasks([task])]
    if missing or not tasks:
        nearest = difflib.get_close_matches(missing[0], manager.all_tasks, n=3) if missing else []
        raise ValueError(
            f"tasks={tasks}: unknown {missing}."
            + (f" Did you mean {', '.join(nearest)}?" if nearest else " `lm_eval ls tasks` lists all tasks.")
        )
    return manager
