"""Jensen-Shannon divergence of next-token (or class) distributions."""

import math

import numpy as np
from numpy.typing import ArrayLike

from distributed_unlearn.evaluation.metrics.per_record import Floats

LARGEST = math.log(2.0)
"""Nats: of distributions that have nothing in common."""


def jensen_shannon(log_p: ArrayLike, log_q: ArrayLike) -> Floats:
    """`1/2 KL(p | m) + 1/2 KL(q | m)`, m the mean of p and q, nats: 0 for equal ones, at most ln 2.

    Args:
        log_p: [N, V], logarithms of probabilities; minus infinity is allowed.
        log_q: [N, V].

    Returns:
        [N].
    """
    one, two = np.asarray(log_p, dtype=np.float64), np.asarray(log_q, dtype=np.float64)
    assert one.ndim == 2 and one.shape == two.shape, "two tables of like shape"
    middle = np.logaddexp(one, two) - math.log(2.0)
    return (_weighted(one, middle) + _weighted(two, middle)) / 2


def _weighted(log_p: Floats, log_m: Floats) -> Floats:
    """`sum p (log p - log m)`; what has no probability adds nothing."""
    there = np.isfinite(log_p)
    gap = np.where(there, log_p, 0.0) - np.where(there, log_m, 0.0)
    return np.asarray((np.where(there, np.exp(np.where(there, log_p, 0.0)), 0.0) * gap).sum(axis=1))
