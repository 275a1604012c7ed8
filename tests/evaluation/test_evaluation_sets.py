"""Scores and Tug-of-War against hand-worked numbers, and what they refuse."""

import dataclasses

import numpy as np
import pytest

from distributed_unlearn.errors import DataError, NumericalError
from distributed_unlearn.evaluation.metrics import score_set, tug_of_war
from distributed_unlearn.records import SetScores


def scores(accuracy: float) -> SetScores:
    return SetScores(num_records=4, num_answer_tokens=40, loss_nats_per_token=1.0, exact_memorisation=accuracy)


def test_score_set_is_a_mean_over_records_of_means_over_tokens():
    # Record losses 2/1 = 2 and 10/10 = 1: mean 1.5, where pooling would give 12/11. Correct 1/1 and 5/10: mean 0.75.
    found = score_set(np.array([2.0, 10.0]), np.array([1, 10]), np.array([1, 5]))
    expected = SetScores(num_records=2, num_answer_tokens=11, loss_nats_per_token=1.5, exact_memorisation=0.75)
    assert dataclasses.replace(found, loss_quantiles=None) == expected


def test_score_set_keeps_how_record_losses_are_spread():
    # Record losses 2, 1 and 4, in order 1, 2, 4: least, median and greatest; a quarter of the way up lies at 1.5.
    found = score_set(np.array([2.0, 10.0, 4.0]), np.array([1, 10, 1]), np.array([1, 5, 0])).loss_quantiles
    assert found is not None and len(found) == 51
    assert (found[0], found[25], found[50]) == (1.0, 2.0, 4.0)
    assert found[12] == pytest.approx(1.0 + 0.24 * 2) and list(found) == sorted(found)


def test_score_set_does_not_depend_on_dtype_or_order():
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 50, 1000)
    nll, correct = generator.exponential(tokens), generator.integers(0, tokens + 1)
    expected = score_set(nll.astype(np.float32), tokens, correct)
    order = generator.permutation(1000)
    found = score_set(nll.astype(np.float32)[order], tokens.astype(np.int32)[order], correct.astype(np.float32)[order])
    assert found.loss_nats_per_token == pytest.approx(expected.loss_nats_per_token, rel=1e-12)
    assert found.exact_memorisation == pytest.approx(expected.exact_memorisation, rel=1e-12)
    assert isinstance(found.loss_nats_per_token, float) and isinstance(found.num_answer_tokens, int)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_score_set_refuses_non_finite_losses(value):
    with pytest.raises(NumericalError, match=r"1 of 2 record losses not finite \(first at position 1\)"):
        score_set(np.array([1.0, value]), np.array([1, 1]), np.array([0, 0]))


def test_score_set_refuses_empty_sets_and_empty_answers():
    with pytest.raises(DataError, match="without records"):
        score_set(np.array([]), np.array([]), np.array([]))
    with pytest.raises(DataError, match=r"1 record\(s\) without answer tokens"):
        score_set(np.array([1.0, 0.0]), np.array([1, 0]), np.array([0, 0]))


@pytest.mark.parametrize("correct", [[2, 0], [-1, 0], [0]])
def test_score_set_asserts_what_the_evaluator_owes_it(correct):
    with pytest.raises(AssertionError):
        score_set(np.array([1.0, 1.0]), np.array([1, 1]), np.array(correct))


def test_tug_of_war_by_hand():
    # |0.5 - 0.4| = 0.1, |0.9 - 1.0| = 0.1, |0.3 - 0.5| = 0.2: 0.9 * 0.9 * 0.8 = 0.648, whichever side is larger.
    unlearned = {"forget": scores(0.5), "retain": scores(0.9), "holdout": scores(0.3)}
    retrained = {"forget": scores(0.4), "retain": scores(1.0), "holdout": scores(0.5)}
    assert tug_of_war(unlearned, retrained) == pytest.approx(0.648, abs=1e-12)
    assert tug_of_war(retrained, unlearned) == pytest.approx(0.648, abs=1e-12)
    assert tug_of_war(unlearned, unlearned) == 1.0
    assert tug_of_war(unlearned, retrained, keys=("forget",)) == pytest.approx(0.9, abs=1e-12)


def test_tug_of_war_of_a_destroyed_and_of_an_untouched_model_are_low():
    retrained = {"forget": scores(0.4), "retain": scores(1.0), "holdout": scores(0.4)}
    assert tug_of_war({key: scores(0.0) for key in retrained}, retrained) == 0.0
    untouched = {"forget": scores(1.0), "retain": scores(1.0), "holdout": scores(0.4)}
    assert tug_of_war(untouched, retrained) == pytest.approx(0.4, abs=1e-12)


def test_tug_of_war_refuses_missing_sets_on_either_side():
    full = {"forget": scores(0.5), "retain": scores(0.9), "holdout": scores(0.3)}
    partial = {key: value for key, value in full.items() if key != "holdout"}
    with pytest.raises(DataError, match="unlearned scores without set 'holdout'"):
        tug_of_war(partial, full)
    with pytest.raises(DataError, match="retrained scores without set 'holdout'"):
        tug_of_war(full, partial)
    with pytest.raises(DataError, match="no set names"):
        tug_of_war(full, full, keys=())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.5, -0.1])
def test_tug_of_war_refuses_what_is_no_accuracy(value):
    with pytest.raises(NumericalError, match="on set 'forget'"):
        tug_of_war({"forget": scores(value)}, {"forget": scores(0.5)}, keys=("forget",))
    with pytest.raises(NumericalError, match="on set 'forget'"):
        tug_of_war({"forget": scores(0.5)}, {"forget": scores(value)}, keys=("forget",))


def test_tug_of_war_refuses_different_record_counts():
    other = dataclasses.replace(scores(0.5), num_records=5)
    with pytest.raises(DataError, match="4 records for the unlearned and 5 for the retrained"):
        tug_of_war({"forget": scores(0.5)}, {"forget": other}, keys=("forget",))
