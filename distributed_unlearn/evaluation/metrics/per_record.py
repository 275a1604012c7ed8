"""Rows of predictions that lie end to end, N of them, made into one number for each of R records."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distributed_unlearn.errors import DataError, NumericalError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def counts_of(num_tokens: ArrayLike) -> Counts:
    """`num_tokens` as int64 [R].

    Raises:
        DataError: no records, or a record without answer tokens.
    """
    counts = np.asarray(num_tokens, dtype=np.int64)
    assert counts.ndim == 1, "one count a record"
    if counts.size == 0:
        raise DataError("a set without records", "at least one record to score", "check the selection of this set")
    if not bool((counts >= 1).all()):
        raise DataError(
            f"{int((counts < 1).sum())} record(s) without answer tokens",
            "at least one answer token in every record",
            "remove records with empty answers, or raise data.max_length",
        )
    return counts


def rows_of(values: ArrayLike, counts: Counts) -> Floats:
    """`values` as float64 [N], one row a prediction of the records that `counts` counts.

    Raises:
        NumericalError: one of them is NaN or infinite.
    """
    rows = np.asarray(values, dtype=np.float64)
    assert rows.shape == (int(counts.sum()),), "one row a prediction"
    return finite(rows, "prediction")


def finite(values: Floats, what: str) -> Floats:
    """`values`, which are one number a `what`.

    Raises:
        NumericalError: one of them is NaN or infinite.
    """
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise NumericalError(
            f"{bad.size} of {values.size} values not finite, one a {what} (first at position {bad[0]})",
            "finite values",
            "the model overflows or is destroyed; evaluate it in float32",
        )
    return values


def starts_of(counts: Counts) -> Counts:
    """Row at which each record begins."""
    return np.cumsum(counts) - counts


def sums(values: ArrayLike, num_tokens: ArrayLike) -> Floats:
    """Sum over each record's predictions: [N] -> [R]."""
    counts = counts_of(num_tokens)
    return np.add.reduceat(rows_of(values, counts), starts_of(counts))


def means(values: ArrayLike, num_tokens: ArrayLike) -> Floats:
    """Mean over each record's predictions: [N] -> [R]; a set's score is their mean, so every record counts alike."""
    counts = counts_of(num_tokens)
    return sums(values, counts) / counts


def lowest_means(values: ArrayLike, num_tokens: ArrayLike, share: float) -> Floats:
    """Mean of the lowest `share` of each record's predictions, at least of one: [N] -> [R].

    The number is `max(1, floor(share * L))`, as in the membership inference of Shi et al. (2024, arXiv 2310.16789).
    """
    assert 0.0 < share <= 1.0, f"share {share}"
    counts = counts_of(num_tokens)
    rows, starts = rows_of(values, counts), starts_of(counts)
    record = np.repeat(np.arange(len(counts)), counts)
    ordered = rows[np.lexsort((rows, record))]
    kept = np.maximum(1, np.floor(share * counts + 1e-9).astype(np.int64))  # 0.4 * 5 may come out below 2
    chosen = np.arange(len(rows)) - np.repeat(starts, counts) < np.repeat(kept, counts)
    return np.add.reduceat(np.where(chosen, ordered, 0.0), starts) / kept
