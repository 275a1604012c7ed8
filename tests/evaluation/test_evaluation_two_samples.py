"""Kolmogorov-Smirnov and the area under the ROC curve against scipy and scikit-learn."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from distributed_unlearn.errors import DataError, NumericalError
from distributed_unlearn.evaluation.metrics.two_samples import area_under_curve, ks_two_samples


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 5), (7, 4), (40, 40), (30, 80), (101, 37)])
@pytest.mark.parametrize("shift", [0.0, 0.4, 2.0])
def test_kolmogorov_smirnov_is_scipys(n, m, shift):
    generator = np.random.default_rng(n + m)
    first, second = generator.normal(size=n), generator.normal(shift, size=m)
    found, expected = ks_two_samples(first, second), stats.ks_2samp(first, second, method="exact")
    assert found.distance == pytest.approx(expected.statistic, abs=1e-14)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)


def test_kolmogorov_smirnov_with_ties_is_scipys():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 4, 50), generator.integers(1, 5, 50)
    found, expected = ks_two_samples(first, second), stats.ks_2samp(first, second, method="exact")
    assert (found.distance, found.p_value) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


def test_samples_that_do_not_overlap_have_the_smallest_p_of_their_size_however_small():
    small = ks_two_samples([1, 2, 3], [4, 5, 6])
    assert small.distance == 1.0 and small.p_value == pytest.approx(2 / math.comb(6, 3))
    large = ks_two_samples(np.arange(2000), np.arange(2000) + 5000)
    expected = math.log10(2) - (math.lgamma(4001) - 2 * math.lgamma(2001)) / math.log(10)
    assert large.p_value == 0.0 and large.log10_p == pytest.approx(expected, rel=1e-10)  # about -1200
    assert large.log10_smallest_p == pytest.approx(expected, rel=1e-10)


def test_equal_samples_cannot_be_told_apart():
    found = ks_two_samples([1.0, 2.0], [2.0, 1.0])
    assert (found.distance, found.p_value, found.log10_p) == (0.0, 1.0, 0.0)


def test_area_under_the_curve_is_scikit_learns_ties_included():
    generator = np.random.default_rng(0)
    positive, negative = generator.integers(0, 9, 70), generator.integers(2, 12, 50)
    expected = roc_auc_score([1] * 70 + [0] * 50, np.concatenate([positive, negative]))
    assert area_under_curve(positive, negative) == pytest.approx(expected, abs=1e-12)
    assert area_under_curve([2, 3], [1, 1]) == 1.0 and area_under_curve([1], [1]) == 0.5


def test_empty_and_infinite_samples_are_refused():
    with pytest.raises(DataError, match="a second sample without records"):
        ks_two_samples([1.0], [])
    with pytest.raises(DataError, match="a positive sample without records"):
        area_under_curve([], [1.0])
    with pytest.raises(NumericalError, match="one a record"):
        area_under_curve([math.inf], [1.0])
