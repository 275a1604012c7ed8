"""Probability, memorisation and extraction against hand-worked answers and plain loops over records."""

import math

import numpy as np
import pytest

from distributed_unlearn.errors import DataError, NumericalError
from distributed_unlearn.evaluation.metrics.memorisation import (
    exact_memorisation,
    extraction_strength,
    mean_losses,
    normalised_probabilities,
)
from distributed_unlearn.evaluation.metrics.per_record import lowest_means, sums


def test_an_answer_counts_once_whatever_its_length():
    nll = [math.log(2.0), math.log(8.0), math.log(4.0)]  # two answers, of two tokens and of one
    assert mean_losses(nll, [2, 1]) == pytest.approx([math.log(4.0), math.log(4.0)])
    assert normalised_probabilities(nll, [2, 1]) == pytest.approx([0.25, 0.25])
    assert exact_memorisation([True, False, True], [2, 1]).tolist() == [0.5, 1.0]


def test_extraction_strength_by_hand():
    # One miss at the start, one in the middle, one at the end, none at all, nothing but misses.
    records = ["0111", "1101", "1110", "1111", "000"]
    hits = [mark == "1" for record in records for mark in record]
    lengths = [len(record) for record in records]
    assert extraction_strength(hits, lengths).tolist() == [0.75, 0.25, 0.0, 1.0, 0.0]
    assert extraction_strength(hits, lengths, floored=True).tolist() == [0.75, 0.25, 0.25, 1.0, 1 / 3]


def loop_extraction_strength(predicted, labels):
    """The published loop, with its floor of 1 / L."""
    for k in range(len(labels)):
        if np.array_equal(predicted[k:], labels[k:]):
            break
    return 1 - k / len(labels)


def test_extraction_strength_is_that_of_a_loop_over_suffixes():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, 200)
    predicted = [generator.integers(0, 2, length) for length in lengths]
    labels = [generator.integers(0, 2, length) for length in lengths]
    hits = np.concatenate(predicted) == np.concatenate(labels)
    expected = [loop_extraction_strength(p, y) for p, y in zip(predicted, labels, strict=True)]
    assert extraction_strength(hits, lengths, floored=True) == pytest.approx(expected)
    exact = [0.0 if p[-1] != y[-1] else value for p, y, value in zip(predicted, labels, expected, strict=True)]
    assert extraction_strength(hits, lengths) == pytest.approx(exact)


@pytest.mark.parametrize(("share", "counts"), [(0.4, {1: 1, 2: 1, 5: 2, 10: 4}), (1.0, {3: 3})])
def test_the_lowest_share_is_rounded_down_but_never_empty(share, counts):
    generator = np.random.default_rng(0)
    lengths = list(counts)
    rows = [generator.normal(size=length) for length in lengths]
    expected = [np.sort(row)[: counts[len(row)]].mean() for row in rows]
    assert lowest_means(np.concatenate(rows), lengths, share) == pytest.approx(expected)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="without records"):
        sums([], [])
    with pytest.raises(DataError, match=r"1 record\(s\) without answer tokens"):
        sums([1.0], [1, 0])
    with pytest.raises(NumericalError, match="1 of 2 values not finite, one a prediction"):
        sums([1.0, math.nan], [1, 1])
    with pytest.raises(AssertionError, match="one row a prediction"):
        sums([1.0], [2])
