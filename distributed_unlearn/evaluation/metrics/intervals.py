"""How sure a number is: bootstrap intervals over records, and the noise floor from two retrained models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distributed_unlearn.evaluation.metrics.per_record import Floats

LEVEL, NUM_RESAMPLES = 0.95, 1000
_VALUES_AT_ONCE = 2**22


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval (Efron 1979)."""

    low: float
    high: float
    level: float = LEVEL


def mean_interval(
    values: ArrayLike, seed: int = 0, level: float = LEVEL, num_resamples: int = NUM_RESAMPLES
) -> Interval | None:
    """Of the mean of one number a record; None for fewer than two records, which say nothing about their spread."""
    found = np.asarray(values, dtype=np.float64)
    assert found.ndim == 1, "one number a record"
    if len(found) < 2:
        return None
    generator = np.random.default_rng(seed)
    rows = max(1, _VALUES_AT_ONCE // len(found))
    parts = [
        found[generator.integers(0, len(found), (min(rows, num_resamples - start), len(found)))].mean(axis=1)
        for start in range(0, num_resamples, rows)
    ]
    return _percentiles(np.concatenate(parts), level)


def bootstrap_interval(
    statistic: Callable[[Mapping[str, NDArray[np.int64]]], float],
    sizes: Mapping[str, int],
    seed: int = 0,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval | None:
    """Of any statistic of one or several sets of records.

    Args:
        statistic: Takes, by set, the indices [n] of the records that were drawn, with repeats; two models that are
            compared on a set are given the same ones.
        sizes: Records of each set.
        seed: Of the draws.
        level: Of the interval.
        num_resamples: Draws.

    Returns:
        The interval; None where a set has fewer than two records.
    """
    if min(sizes.values(), default=0) < 2:
        return None
    generator = np.random.default_rng(seed)
    drawn = [
        statistic({name: generator.integers(0, size, size) for name, size in sizes.items()})
        for _ in range(num_resamples)
    ]
    return _percentiles(np.array(drawn), level)


def _percentiles(values: Floats, level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def noise_floor(retrained: float, retrained_again: float) -> float:
    """`|m(r_1) - m(r_2)|`: how far a metric moves between two retrained models that differ in their seed alone.

    A distance to the reference below it says nothing.
    """
    return abs(retrained - retrained_again)
