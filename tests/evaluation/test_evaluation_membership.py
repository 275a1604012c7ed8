"""Attacks against dense distributions and hand-worked numbers; PrivLeak's sign and its refusal."""

import zlib

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from distributed_unlearn.errors import DataError
from distributed_unlearn.evaluation.metrics.membership import (
    mia_auc,
    min_k_plus_plus_scores,
    min_k_scores,
    priv_leak,
    reference_scores,
    zlib_scores,
)


def test_min_k_and_min_k_plus_plus_against_dense_distributions():
    generator = np.random.default_rng(0)
    lengths, num_words = [5, 3], 7
    log_p = np.log(generator.dirichlet(np.ones(num_words), size=sum(lengths)))
    labels = generator.integers(0, num_words, sum(lengths))
    chosen = log_p[np.arange(len(labels)), labels]
    mu = (np.exp(log_p) * log_p).sum(1)
    variance = (np.exp(log_p) * (log_p - mu[:, None]) ** 2).sum(1)
    standard = (chosen - mu) / np.sqrt(variance)
    plain = [np.sort(chosen[:5])[:2].mean(), np.sort(chosen[5:])[:1].mean()]
    plus = [np.sort(standard[:5])[:2].mean(), np.sort(standard[5:])[:1].mean()]
    assert min_k_scores(-chosen, lengths) == pytest.approx([-value for value in plain])
    assert min_k_plus_plus_scores(-chosen, -mu, variance, lengths) == pytest.approx([-value for value in plus])


def test_a_certain_distribution_has_no_spread_and_no_infinite_score():
    assert np.isfinite(min_k_plus_plus_scores([0.0, 50.0], [0.0, 0.0], [0.0, 0.0], [1, 1])).all()


def test_zlib_and_reference_scores_by_hand():
    sizes = [len(zlib.compress(text.encode())) for text in ("a" * 50, "An answer.")]
    assert zlib_scores([4.0, 3.0, 3.0], [1, 2], sizes) == pytest.approx([4.0 / sizes[0], 3.0 / sizes[1]])
    assert reference_scores([4.0, 3.0], [1.0, 5.0], [1, 1]).tolist() == [3.0, -2.0]


def test_auc_is_one_where_every_forget_record_is_better_known_than_every_unseen_one():
    assert mia_auc([0.1, 0.2], [1.0, 2.0]) == 1.0 and mia_auc([3.0], [1.0, 2.0]) == 0.0
    generator = np.random.default_rng(0)
    forget, holdout = generator.normal(0.0, 1.0, 30), generator.normal(0.5, 1.0, 40)
    expected = roc_auc_score([0] * 30 + [1] * 40, np.concatenate([forget, holdout]))
    assert mia_auc(forget, holdout) == pytest.approx(expected, abs=1e-12)


def test_priv_leak_is_minus_100_where_nothing_is_forgotten_and_above_0_where_too_much_is():
    # MUSE's own: AUC of the log-probability with the holdout as positive, relative to the retrained model's.
    forget, holdout = np.array([0.1, 0.2, 1.5]), np.array([1.0, 2.0, 3.0])
    muse = roc_auc_score([0] * 3 + [1] * 3, -np.concatenate([forget, holdout]))
    assert priv_leak(mia_auc(forget, holdout), 0.55) == pytest.approx(100 * (muse - 0.45) / 0.45)
    assert priv_leak(1.0, 0.5) == -100.0 and priv_leak(0.6, 0.6) == 0.0 and priv_leak(0.0, 0.5) == 100.0
    with pytest.raises(DataError, match="finds every forget record easier"):
        priv_leak(0.5, 1.0)
