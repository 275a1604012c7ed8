"""Intervals against scipy's bootstrap and known spreads; every metric's words."""

import numpy as np
import pytest
from scipy import stats

from distributed_unlearn.evaluation.metrics.catalogue import METRICS
from distributed_unlearn.evaluation.metrics.intervals import bootstrap_interval, mean_interval, noise_floor


def test_the_interval_of_a_mean_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).exponential(size=80)
    found = mean_interval(values, num_resamples=4000)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    # Both are Monte-Carlo: their ends agree to a few hundredths of their distance.
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.05 * (found.high - found.low))


def test_the_interval_of_a_statistic_draws_every_set_by_itself_and_is_reproducible():
    first, second = np.random.default_rng(0).normal(size=(2, 50))

    def difference(drawn):
        assert len(drawn["first"]) == len(drawn["second"]) == 50
        return float(first[drawn["first"]].mean() - second[drawn["second"]].mean())

    found = bootstrap_interval(difference, {"first": 50, "second": 50})
    assert found == bootstrap_interval(difference, {"first": 50, "second": 50})
    error = np.sqrt((first.var() + second.var()) / 50)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < first.mean() - second.mean() < found.high


def test_one_record_has_no_spread():
    assert mean_interval([1.0]) is None
    assert bootstrap_interval(lambda drawn: 0.0, {"forget": 1, "holdout": 9}) is None
    assert noise_floor(0.3, 0.5) == pytest.approx(0.2)


def test_every_metric_has_one_sentence_for_everybody():
    for metric in METRICS:
        assert metric.sentence.endswith(".") and metric.sentence.count(". ") == 0, metric.name
        assert metric.title and metric.name.isidentifier()
