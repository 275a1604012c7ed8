"""What a sample of a minibatch says of the whole of it, with an error bound: finite-population sampling by strata."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
"""One-sided, of the bounds of a sampled change."""


@dataclass(frozen=True)
class SampledChange:
    """How much a sum over a minibatch's records has changed, as a sample of the records tells."""

    total: float
    """The estimate; not finite where a record's change is not."""
    error: float | None
    """The true change is below `total + error` with probability `CONFIDENCE`; 0.0: every record was measured; None: the
    sample says nothing of the minibatch."""


def estimate_change(samples: Sequence[NDArray[np.float64]], sizes: Sequence[int]) -> SampledChange:
    """The change of a sum from that of some of its addends, drawn at random without replacement within each stratum.

    With `N_h` addends in stratum h, `n_h` of them known with mean `m_h` and variance `s_h^2`:

        total = sum_h N_h m_h,   v_h = N_h^2 (1 - n_h / N_h) s_h^2 / n_h,   error = t sqrt(sum_h v_h)

    with `t` Student's quantile at `CONFIDENCE` for `(sum v_h)^2 / sum (v_h^2 / (n_h - 1))` degrees of freedom, rounded
    down (Cochran 1977, Sampling Techniques, sections 5.3 to 5.5; Satterthwaite 1946). Changes of the same records
    before and after an update are paired: what differs between records, but not by the update, is not in them.

    Args:
        samples: the known addends, [n_h] each.
        sizes: `N_h`, at least `n_h` each; a stratum without addends has an empty sample.
    """
    assert len(samples) == len(sizes) and all(len(s) <= n for s, n in zip(samples, sizes, strict=True))
    total, variances, weights = 0.0, [], []
    for sample, size in zip(samples, sizes, strict=True):
        count = len(sample)
        if size == 0:
            continue
        if count < size and count < 2:
            return SampledChange(math.nan if count == 0 else total, None)
        total += size / count * math.fsum(sample) if np.isfinite(sample).all() else math.nan
        if count < size:
            variances.append(size**2 * (1 - count / size) * float(np.var(sample, ddof=1)) / count)
            weights.append(count - 1)
    variance = sum(variances)
    if variance == 0.0 or not math.isfinite(variance):
        return SampledChange(total, 0.0 if variance == 0.0 else math.nan)
    freedom = variance**2 / sum(v * v / w for v, w in zip(variances, weights, strict=True))
    return SampledChange(total, student_quantile(CONFIDENCE, max(1, int(freedom))) * math.sqrt(variance))


def student_quantile(probability: float, freedom: int) -> float:
    """`t` with `P(T <= t) = probability` of Student's distribution with this many degrees of freedom, at least 1.

    `P(|T| <= t)` is a finite sum in `theta = atan(t / sqrt(freedom))` (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4);
    theta is found by bisection.
    """
    assert 0.5 <= probability < 1.0 and freedom >= 1

    def between(theta: float) -> float:
        cosine, odd = math.cos(theta), freedom % 2
        term = total = (cosine if freedom > 1 else 0.0) if odd else 1.0
        for k in range(2 + odd, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if between(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
