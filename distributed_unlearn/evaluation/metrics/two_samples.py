"""Two samples of numbers: the Kolmogorov-Smirnov test, exact in logarithms, and the area under the ROC curve."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from distributed_unlearn.errors import DataError
from distributed_unlearn.evaluation.metrics.per_record import Floats, finite


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """A two-sided two-sample test that both come from one distribution."""

    distance: float
    """`D = sup |F_1 - F_2|` of the empirical distribution functions."""
    log10_p: float
    """Of the exact p-value; finite where p itself is too small for a float."""
    num_first: int
    num_second: int

    @property
    def p_value(self) -> float:
        """`P(D' >= D)` under equality; 0 where it is below 1e-308, `log10_p` then tells how far."""
        return 10.0**self.log10_p

    @property
    def log10_smallest_p(self) -> float:
        """log10 of the smallest p that samples of these sizes can have, `2 / C(n + m, n)`: p depends on them."""
        n, m = self.num_first, self.num_second
        choose = math.lgamma(n + m + 1) - math.lgamma(n + 1) - math.lgamma(m + 1)
        return min(0.0, (math.log(2.0) - choose) / math.log(10.0))


def _sample(values: ArrayLike, what: str) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    assert found.ndim == 1, "a sample is one row of numbers"
    if found.size == 0:
        raise DataError(f"a {what} sample without records", "at least one record in each", "check the selections")
    return finite(found, "record")


def ks_two_samples(first: ArrayLike, second: ArrayLike) -> KolmogorovSmirnov:
    """The test of `scipy.stats.ks_2samp(first, second, method="exact")`, with the p-value as a logarithm.

    Under equality each of the `C(n + m, n)` orders is as likely as any other, an order is a path on a lattice, and p is
    the share of paths that touch `|i/n - j/m| >= D` (Hodges 1958). It is summed along diagonals, all terms positive
    and in logarithms, so that it keeps its relative precision however small it is.

    Returns:
        Distance and p-value, in O((n + m) min(n, m)).

    Raises:
        DataError: an empty sample.
        NumericalError: a value that is not finite.
    """
    one, two = np.sort(_sample(first, "first")), np.sort(_sample(second, "second"))
    both = np.concatenate([one, two])
    n, m = len(one), len(two)
    # In whole numbers, |i m - j n|: distances that are equal must compare so.
    below = np.searchsorted(one, both, side="right") * m - np.searchsorted(two, both, side="right") * n
    largest = int(np.abs(below).max())
    log_p = 0.0 if largest == 0 else _log_share_outside(min(n, m), max(n, m), largest)
    return KolmogorovSmirnov(largest / (n * m), min(0.0, log_p / math.log(10.0)), n, m)


def _log_share_outside(n: int, m: int, largest: int) -> float:
    """Log of the share of lattice paths to (n, m) that touch `|i m - j n| >= largest`; n is the smaller."""
    i = np.arange(n + 1)
    reached = np.full(n + 1, -np.inf)  # by i on the current diagonal; (0, 0) is inside
    for k in range(1, n + m + 1):
        j = k - i
        possible = (j >= 0) & (j <= m)
        with np.errstate(divide="ignore"):
            from_left = np.concatenate([[-np.inf], reached[:-1]]) + np.log(i / k)
            from_below = reached + np.log(np.maximum(j, 0) / k)
        reached = np.logaddexp(from_left, from_below)
        reached = np.where(np.abs(i * m - j * n) >= largest, 0.0, reached)
        reached = np.where(possible, reached, -np.inf)
    return float(reached[n])


def area_under_curve(positive: ArrayLike, negative: ArrayLike) -> float:
    """`P(positive > negative) + P(equal) / 2` over all pairs: the area under the ROC curve of a score.

    Raises:
        DataError: an empty sample.
        NumericalError: a value that is not finite.
    """
    high, low = _sample(positive, "positive"), np.sort(_sample(negative, "negative"))
    wins = np.searchsorted(low, high, side="left") + np.searchsorted(low, high, side="right")
    return float(wins.mean() / (2 * len(low)))
