"""Evaluation: likelihood bounds with standard errors, generated answers, and the lm-evaluation-harness."""

from dlm_tune.evaluation.likelihood import LogLikelihood, estimate_nelbo, log_likelihood

__all__ = ["LogLikelihood", "estimate_nelbo", "log_likelihood"]
