"""The stopping rule: both conditions, patience, the clock, and NaN."""

import math

import pytest

from distributed_unlearn.solvers.stopping import StoppingRule


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
    assert reason is not None and "step 5" in reason and "0.120" in reason and "2 consecutive" in reason


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
