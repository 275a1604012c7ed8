"""Truth ratio, forget quality, model utility and divergence: hand-worked, and against scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon

from distributed_unlearn.engine.survey import jensen_shannon
from distributed_unlearn.errors import DataError
from distributed_unlearn.evaluation.metrics.truth import (
    UTILITY_MEASURES,
    UTILITY_SETS,
    choice_probabilities,
    forget_quality,
    forget_truth_scores,
    model_utility,
    retain_truth_scores,
    truth_ratios,
)


def losses(*probabilities):
    return [-math.log(p) for p in probabilities]


def test_truth_ratio_by_hand_with_both_means():
    right, wrong = losses(0.5), [losses(0.1, 0.4)]
    assert truth_ratios(right, wrong) == pytest.approx([math.sqrt(0.1 * 0.4) / 0.5])
    assert truth_ratios(right, wrong, "arithmetic") == pytest.approx([0.25 / 0.5])


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_a_record_may_have_fewer_wrong_answers(mean):
    ragged = truth_ratios(losses(0.5, 0.5), [[*losses(0.2), math.nan], losses(0.2, 0.2)], mean)
    assert ragged == pytest.approx([0.4, 0.4])
    with pytest.raises(DataError, match="without wrong answers"):
        truth_ratios(losses(0.5), [[math.nan]], mean)


def test_forget_and_retain_scalars():
    assert forget_truth_scores([0.5, 2.0, 1.0]).tolist() == [0.5, 0.5, 1.0]
    assert forget_truth_scores([0.0]).tolist() == [0.0]
    assert retain_truth_scores([0.25, 2.0]).tolist() == [0.75, 0.0]


def test_choice_probability_by_hand():
    assert choice_probabilities(losses(0.3), [[*losses(0.1, 0.2), math.nan]]) == pytest.approx([0.5])


def test_forget_quality_is_the_test_of_the_truth_ratios():
    generator = np.random.default_rng(0)
    ours, reference = generator.gamma(2.0, size=60), generator.gamma(2.5, size=60)
    expected = stats.ks_2samp(ours, reference)
    assert forget_quality(ours, reference).p_value == pytest.approx(expected.pvalue, rel=1e-9)


def test_model_utility_is_the_harmonic_mean_of_nine_and_refuses_eight():
    values = np.linspace(0.2, 1.0, 9)
    parts = dict(zip([(s, m) for s in UTILITY_SETS for m in UTILITY_MEASURES], values, strict=True))
    measures = {name: {m: float(parts[name, m]) for m in UTILITY_MEASURES} for name in UTILITY_SETS}
    assert model_utility(measures) == pytest.approx(stats.hmean(values))
    measures["retain"]["rouge_l"] = 0.0
    assert model_utility(measures) == 0.0
    del measures["world_facts"]["truth_ratio"]
    with pytest.raises(DataError, match="model utility without world_facts truth_ratio"):
        model_utility(measures)


def test_divergence_is_scipys_squared():
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(11), 6), generator.dirichlet(np.ones(11), 6)
    found = jensen_shannon(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)))
    assert found.numpy() == pytest.approx(jensenshannon(p, q, axis=1) ** 2, rel=1e-10)


def test_divergence_of_equal_and_of_disjoint_distributions():
    with np.errstate(divide="ignore"):
        one, other = (torch.from_numpy(np.log([row])) for row in ([1.0, 0.0, 0.0], [0.0, 0.5, 0.5]))
    assert jensen_shannon(one, one).tolist() == [0.0]
    assert jensen_shannon(one, other).tolist() == pytest.approx([math.log(2.0)])
