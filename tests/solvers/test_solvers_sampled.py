"""A sample's estimate of a change and its bound; and trials that are decided by one."""

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from distributed_unlearn.solvers.methods.scurenewton import SCureNewton, SCureNewtonSettings
from distributed_unlearn.solvers.sampled import estimate_change, student_quantile
from tests.solvers.memory_oracle import MemoryOracle


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 30, 101])
def test_student_quantiles_are_those_of_scipy(freedom):
    for probability in (0.6, 0.95, 0.995):
        assert student_quantile(probability, freedom) == pytest.approx(student.ppf(probability, freedom), rel=1e-10)


def test_estimate_is_unbiased_and_its_bound_holds_as_often_as_it_says():
    """Over many draws by strata: the mean within 4 standard errors, the share of misses near 5 %."""
    rng = np.random.default_rng(0)
    strata = [-1.0 + rng.standard_normal(24), 0.5 + 0.3 * rng.standard_normal(24)]
    truth, estimates, missed = sum(float(s.sum()) for s in strata), [], 0
    for _ in range(4000):
        found = estimate_change([rng.choice(s, 4, replace=False) for s in strata], [24, 24])
        assert found.error is not None and found.error > 0
        estimates.append(found.total)
        missed += truth > found.total + found.error
    spread = np.std(estimates) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - truth) < 4 * spread
    assert 0.03 < missed / len(estimates) < 0.07


def test_all_records_are_no_estimate_and_one_of_several_bounds_nothing():
    values = np.array([1.0, -2.0, 4.5])
    assert estimate_change([values, np.empty(0)], [3, 0]).error == 0.0
    assert estimate_change([values, np.empty(0)], [3, 0]).total == 3.5
    assert estimate_change([values, values[:1]], [6, 6]).error is None
    assert np.isnan(estimate_change([np.array([np.nan, 1.0])], [4]).total)


def quadratic(w, step):
    return 10.0 + 0.5 * (w - 1.0) @ (w - 1.0)


ORIGIN = torch.zeros(3, dtype=torch.float64)
SETTINGS = {"cubic_coefficient": 1e-3, "krylov_tolerance": 0.0}


@pytest.mark.parametrize(
    ("error", "settings", "num_whole"),
    [
        (0.1, {}, 0),  # clear: the reduction is 1.5 and must be at least 0.15
        (1.36, {}, 1),
        (1.34, {}, 0),
        (None, {}, 1),  # no sample at all
        (0.1, {"adaptation": "factor"}, 1),
        (0.1, {"adaptive": False}, 1),
    ],
)
def test_the_whole_minibatch_is_measured_where_a_sample_is_not_clear(error, settings, num_whole):
    oracle = MemoryOracle(quadratic, ORIGIN, lambda w, step: quadratic(w, step))
    oracle.plain.sample_error = error
    record = SCureNewton(oracle, SCureNewtonSettings(**SETTINGS, **settings)).step(0)
    assert record.accepted and record.actual_reduction == pytest.approx(1.5, rel=1e-3)
    assert oracle.plain.num_whole == num_whole


def test_a_sample_cannot_reject_by_itself():
    """The sample says the loss rises, the whole says it falls: measured, and kept."""
    oracle = MemoryOracle(quadratic, ORIGIN, lambda w, step: quadratic(w, step))
    oracle.plain.sample_error = 1e-3
    estimate = oracle.plain.sampled_change
    oracle.plain.sampled_change = lambda: type(estimate())(5.0, 1e-3)  # type: ignore[method-assign]
    record = SCureNewton(oracle, SCureNewtonSettings(**SETTINGS)).step(0)
    assert record.accepted and record.num_rejections == 0 and oracle.plain.num_whole == 1
    assert record.actual_reduction == pytest.approx(1.5, rel=1e-3)


def test_a_step_that_gives_up_lets_go_of_its_graphs_and_caps_the_coefficient():
    """Rejections, then an inner solver without a proposal: the next step starts at most increase_factor^2 higher."""
    oracle = MemoryOracle(quadratic, ORIGIN)
    oracle.plain.whole_change = lambda at_start: 1e9  # type: ignore[method-assign]
    oracle.plain.has_own_curvature_minibatch = True  # error None: the whole decides
    solver = SCureNewton(oracle, SCureNewtonSettings(cubic_coefficient=1.0, max_rejections=50))
    inner, calls = solver._inner, []
    propose = inner.propose

    def third_has_none(coefficient):
        calls.append(coefficient)
        found = propose(coefficient)
        return found if len(calls) < 4 else type(found)(result=type(found.result).nonfinite)

    inner.propose = third_has_none  # type: ignore[method-assign]
    record = solver.step(0)
    assert record.result == "nonfinite" and record.num_rejections == 3 and calls[-1] > 16.0
    assert solver.cubic_coefficient == 16.0
    assert oracle.plain.num_released == 1 and oracle._problem is None
