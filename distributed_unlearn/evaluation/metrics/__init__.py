"""Metrics as functions of numpy arrays: no model, no file, no process group. `catalogue` says what each one tells."""

from distributed_unlearn.evaluation.metrics.sets import score_set, tug_of_war

__all__ = ["score_set", "tug_of_war"]
