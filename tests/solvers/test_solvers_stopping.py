"""The stopping rule: both conditions, patience, the clock, and NaN."""

import math

import numpy as np
import pytest
from scipy import stats

from distributed_unlearn.solvers.stopping import (
    NEGLIGIBLE_DISTANCE,
    StoppingRule,
    TwoSampleRule,
    critical_distance,
    two_sample_distance,
)


def rule(holdout: float | None = 3.0, patience: int = 2, max_seconds: float | None = None) -> StoppingRule:
    return StoppingRule(holdout, 0.1, 0.15, 0.05, patience, max_seconds)


def test_patience_counts_consecutive_steps() -> None:
    stopping = rule()
    assert stopping.update(0, 0.15, 0.15, 1.0) is None  # both conditions hold with equality
    assert stopping.update(1, 0.16, 0.10, 2.0) is None  # forget too far: starts again
    assert stopping.update(2, 0.10, 0.10, 3.0) is None
    assert stopping.update(3, 0.10, 0.16, 4.0) is None  # retain too high: starts again
    assert stopping.update(4, 0.10, 0.12, 5.0) is None
    reason = stopping.update(5, 0.12, 0.14, 6.0)
    assert reason is not None and "after step 6 " in reason and "0.120" in reason and "2 consecutive" in reason


def test_no_holdout_loss_and_no_measurement_never_match() -> None:
    assert all(rule(None, patience=1).update(step, 0.0, 0.0, 1e9) is None for step in range(3))
    assert rule(patience=1).update(0, None, 0.0, 1e9) is None


@pytest.mark.parametrize(("distance", "retain"), [(math.nan, 0.0), (0.0, math.nan)])
def test_nan_never_stops(distance: float, retain: float) -> None:
    assert rule(patience=1).update(0, distance, retain, 0.0) is None


def test_clock() -> None:
    stopping = rule(None, max_seconds=10.0)
    assert stopping.update(0, None, 1.0, 9.9) is None
    reason = stopping.update(1, None, 1.0, 10.0)
    assert reason is not None and reason.startswith("max_seconds: 10.0 s")
    assert "holdout" in (rule(patience=1, max_seconds=10.0).update(0, 0.0, 0.0, 99.0) or "")  # the better news first


def test_refusals() -> None:
    with pytest.raises(ValueError, match="patience 0"):
        rule(patience=0)
    with pytest.raises(ValueError, match="max_seconds"):
        rule(max_seconds=0.0)
    with pytest.raises(ValueError, match="tolerances"):
        StoppingRule(3.0, 0.1, 0.0, 0.05, 2, None)


def test_the_distance_of_two_samples() -> None:
    generator = np.random.default_rng(0)
    for num_first, num_second in ((1, 1), (5, 9), (300, 40)):
        first, second = generator.standard_normal(num_first).round(1), generator.standard_normal(num_second).round(1)
        expected = stats.ks_2samp(first, second).statistic  # ties included
        assert two_sample_distance(first, second) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(two_sample_distance(np.array([0.0, math.nan]), np.array([0.0])))


@pytest.mark.parametrize(("num_first", "num_second", "level"), [(400, 600, 0.05), (3000, 500, 0.01)])
def test_the_critical_distance_is_where_the_test_turns(num_first: int, num_second: int, level: float) -> None:
    """Two samples of which the second is shifted by ranks until their distance is just below or above."""
    critical = critical_distance(num_first, num_second, level)
    for factor, rejected in ((0.94, False), (1.06, True)):
        shift = factor * critical
        first, second = (np.arange(n) / n for n in (num_first, num_second))
        found = stats.ks_2samp(first, second + shift, method="asymp")
        assert (found.pvalue < level) == rejected


def test_a_round_ends_when_the_distributions_cannot_be_told_apart() -> None:
    generator = np.random.default_rng(1)
    holdout, unlearned = generator.standard_normal(800), generator.standard_normal(600)
    stopping = TwoSampleRule(holdout, len(unlearned), 0.05, 0.1, 0.05, 2, None)
    assert stopping.forget_tolerance == pytest.approx(1.358 * math.sqrt(1 / 800 + 1 / 600), rel=1e-3)
    assert stopping.update(0, stopping.distance(unlearned + 3.0), 0.1, 1.0) is None
    assert stopping.update(1, stopping.distance(unlearned), 0.2, 1.0) is None  # the retain loss is too high
    assert stopping.update(2, stopping.distance(unlearned), 0.1, 1.0) is None
    reason = stopping.update(3, stopping.distance(unlearned), 0.1, 1.0)
    assert reason is not None and "distributed as the holdout's" in reason and "level 0.05" in reason
    # The mean alone does not do: the same mean, half of the tokens certain.
    half = np.where(np.arange(600) % 2, 6.0, -6.0) + unlearned
    assert TwoSampleRule(holdout, 600, 0.05, 0.1, 0.05, 1, None).update(0, stopping.distance(half), 0.1, 1.0) is None
    assert TwoSampleRule(holdout, 10**9, 0.05, 0.1, 0.05, 1, None).forget_tolerance > NEGLIGIBLE_DISTANCE - 1e-12


def test_refusals_of_the_two_sample_rule() -> None:
    with pytest.raises(ValueError, match="level 0"):
        TwoSampleRule(np.zeros(3), 3, 0.0, 0.1, 0.05, 1, None)
    with pytest.raises(ValueError, match="0 holdout"):
        TwoSampleRule(np.zeros(0), 3, 0.05, 0.1, 0.05, 1, None)
