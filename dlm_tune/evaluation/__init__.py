"""Evaluation: likelihood bounds with standard errors, generated answers, and the lm-evaluation-harness."""

from dlm_tune.evaluation.completions import CompletionReport, evaluate_completions
from dlm_tune.evaluation.harness import run_harness
from dlm_tune.evaluation.likelihood import LogLikelihood, estimate_nelbo, log_likelihood

__all__ = [
    "CompletionReport",
    "LogLikelihood",
    "estimate_nelbo",
    "evaluate_completions",
    "log_likelihood",
    "run_harness",
]
