"""TOFU's metrics (Maini et al. 2024, arXiv 2401.06121): truth ratio, forget quality, model utility."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from distributed_unlearn.errors import DataError
from distributed_unlearn.evaluation.metrics.per_record import Floats, finite
from distributed_unlearn.evaluation.metrics.two_samples import KolmogorovSmirnov, ks_two_samples

TruthMean = Literal["geometric", "arithmetic"]
"""Over the wrong answers: geometric as OpenUnlearning, arithmetic as the TOFU paper. Say which beside every number."""
_SMALL = 1e-10
UTILITY_SETS, UTILITY_MEASURES = ("retain", "real_authors", "world_facts"), ("probability", "rouge_l", "truth_ratio")


def _losses(values: ArrayLike, num_dimensions: int) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    assert found.ndim == num_dimensions, f"{found.ndim} dimensions, expected {num_dimensions}"
    if found.size == 0:
        raise DataError("no records, or no wrong answers", "at least one of each", "check the data")
    return finite(found, "answer")


def truth_ratios(paraphrase_losses: ArrayLike, wrong_losses: ArrayLike, mean: TruthMean = "geometric") -> Floats:
    """`R = P_wrong / (P_paraphrase + 1e-10)`, P the normalised probability of an answer.

    Args:
        paraphrase_losses: [n], mean loss of each record's right answer in other words, nats per token.
        wrong_losses: [n, K], those of its K wrong answers; NaN where a record has fewer.
        mean: `P_wrong` is `exp(-mean_i loss_i)` (geometric) or `mean_i exp(-loss_i)` (arithmetic).

    Returns:
        [n], above 0: far below 1 where the model knows the right answer.
    """
    right = _losses(paraphrase_losses, 1)
    wrong = np.asarray(wrong_losses, dtype=np.float64)
    assert wrong.ndim == 2 and len(wrong) == len(right), "one row of wrong answers a record"
    there = ~np.isnan(wrong)
    if not bool(there.any(axis=1).all()):
        raise DataError("a record without wrong answers", "at least one each", "complete the perturbed answers")
    _losses(wrong[there], 1)
    counts = there.sum(axis=1)
    if mean == "geometric":
        wrong_probability = np.exp(-np.where(there, wrong, 0.0).sum(axis=1) / counts)
    else:
        wrong_probability = np.where(there, np.exp(-np.where(there, wrong, 0.0)), 0.0).sum(axis=1) / counts
    return wrong_probability / (np.exp(-right) + _SMALL)


def forget_truth_scores(ratios: ArrayLike) -> Floats:
    """`min(R, 1/R)`, [n]; their mean is the forget set's truth ratio, which is to be the retrained model's, not 1."""
    found = _losses(ratios, 1)
    with np.errstate(divide="ignore"):
        return np.minimum(found, 1.0 / found)


def retain_truth_scores(ratios: ArrayLike) -> Floats:
    """`max(0, 1 - R)`, [n]; their mean is a kept set's truth ratio, higher is better."""
    return np.maximum(0.0, 1.0 - _losses(ratios, 1))


def choice_probabilities(right_losses: ArrayLike, wrong_losses: ArrayLike) -> Floats:
    """`P(a) / (P(a) + sum_i P(wrong_i) + 1e-10)`: the probability measure of real authors and world facts.

    Args:
        right_losses: [n], mean loss of the right answer, nats per token.
        wrong_losses: [n, K]; NaN where a record has fewer.

    Returns:
        [n], 0 to 1.
    """
    right = np.exp(-_losses(right_losses, 1))
    wrong = np.asarray(wrong_losses, dtype=np.float64)
    assert wrong.ndim == 2 and len(wrong) == len(right), "one row of wrong answers a record"
    _losses(wrong[~np.isnan(wrong)], 1)
    return right / (right + np.nansum(np.exp(-wrong), axis=1) + _SMALL)


def forget_quality(ratios: ArrayLike, retrained_ratios: ArrayLike) -> KolmogorovSmirnov:
    """Are the unlearned model's truth ratios on the forget set distributed as the retrained model's?

    The p-value depends on the number of records: show D, log10 p and n together. Above 0.05 is not told apart.
    """
    return ks_two_samples(ratios, retrained_ratios)


def model_utility(measures: Mapping[str, Mapping[str, float]]) -> float:
    """Harmonic mean of nine: probability, ROUGE-L recall and truth ratio on the retain set, real authors, world facts.

    Args:
        measures: By set (`retain`, `real_authors`, `world_facts`), then by measure (`probability`, `rouge_l`,
            `truth_ratio`), each 0 to 1.

    Returns:
        0 to 1; 0 where any of the nine is 0.

    Raises:
        DataError: one of the nine is missing.
    """
    missing = [
        f"{name} {part}" for name in UTILITY_SETS for part in UTILITY_MEASURES if part not in measures.get(name, {})
    ]
    if missing:
        raise DataError(
            f"model utility without {', '.join(missing)}",
            "all nine of its parts",
            "give the perturbed answers of every set and switch generation on, or leave model utility out",
        )
    values = finite(np.array([measures[name][part] for name in UTILITY_SETS for part in UTILITY_MEASURES]), "part")
    assert bool((values >= 0).all()), "a negative part of model utility"
    return 0.0 if bool((values == 0).any()) else float(len(values) / (1.0 / values).sum())
