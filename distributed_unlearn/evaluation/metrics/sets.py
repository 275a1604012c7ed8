"""Scores of a model from per-record sums: numpy arrays in, floats out. No model, no file, no process group."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distributed_unlearn.errors import DataError, NumericalError
from distributed_unlearn.records import SetScores

QUANTILES = np.linspace(0.0, 1.0, 51)
"""Of `SetScores.loss_quantiles`."""


def score_set(nll: ArrayLike, num_tokens: ArrayLike, num_correct: ArrayLike) -> SetScores:
    """Mean answer loss and exact memorisation of one model on one set, from sums over each record's answer.

    `loss = (1/n) sum_i nll_i / L_i` and `exact_memorisation = (1/n) sum_i num_correct_i / L_i`: means over records
    of per-record means, not pooled over tokens, so a long answer counts as much as a short one. The quantiles are those
    of the per-record means, between neighbours linear.

    Args:
        nll: Shape [n], sum over the record's answer tokens of `-log p`, nats.
        num_tokens: Shape [n], answer tokens `L_i`, at least 1.
        num_correct: Shape [n], answer positions whose teacher-forced argmax is the label, 0 to `L_i`.

    Returns:
        The scores; all arithmetic in float64.

    Raises:
        DataError: no records, or a record without answer tokens.
        NumericalError: a loss is NaN or infinite.
    """
    losses, tokens, correct = (np.asarray(values, dtype=np.float64) for values in (nll, num_tokens, num_correct))
    assert losses.ndim == 1 and losses.shape == tokens.shape == correct.shape, "one entry per record in each array"
    if losses.size == 0:
        raise DataError("a set without records", "at least one record to score", "check the selection of this set")
    if not bool((tokens >= 1).all()):
        num_empty = int((~(tokens >= 1)).sum())
        raise DataError(
            f"{num_empty} record(s) without answer tokens",
            "at least one answer token in every record",
            "remove records with empty answers, or raise data.max_length",
        )
    assert bool(((correct >= 0) & (correct <= tokens)).all()), "more correct positions than answer tokens"
    _refuse_non_finite(losses)
    return SetScores(
        num_records=int(losses.size),
        num_answer_tokens=int(tokens.sum()),
        loss_nats_per_token=float((losses / tokens).mean()),
        exact_memorisation=float((correct / tokens).mean()),
        loss_quantiles=tuple(np.quantile(losses / tokens, QUANTILES).tolist()),
    )


def tug_of_war(
    unlearned: Mapping[str, SetScores],
    retrained: Mapping[str, SetScores],
    keys: Sequence[str] = ("forget", "retain", "holdout"),
) -> float:
    """Closeness of an unlearned to a retrained model: 1 is indistinguishable on these sets, higher is better.

    `ToW = prod over S in keys of (1 - |acc_u(S) - acc_r(S)|)`, with exact memorisation as the accuracy
    (Zhao et al. 2024, arXiv 2406.01257; there the accuracy of a classifier, here of teacher-forced tokens).

    Args:
        unlearned: Scores of the unlearned model by set name.
        retrained: Scores of the retrained model by set name, on the same records.
        keys: The sets in the product.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: a set is missing from either side, or was scored on a different number of records.
        NumericalError: an accuracy is not a number in [0, 1].
    """
    if not keys:
        raise DataError("no set names", "at least one set in the Tug-of-War", "pass keys=('forget', ...)")
    product = 1.0
    for key in keys:
        ours, reference = _scores_of("unlearned", unlearned, key), _scores_of("retrained", retrained, key)
        if ours.num_records != reference.num_records:
            raise DataError(
                f"set '{key}' with {ours.num_records} records for the unlearned and {reference.num_records} for the "
                "retrained model",
                "the same records for both",
                "score both models on the same selection",
            )
        product *= 1.0 - abs(_accuracy(ours, key) - _accuracy(reference, key))
    return product


def _scores_of(side: str, scores: Mapping[str, SetScores], key: str) -> SetScores:
    if key not in scores:
        raise DataError(
            f"{side} scores without set '{key}' (there are: {', '.join(sorted(scores)) or 'none'})",
            "scores of every set in the product",
            f"score the {side} model on '{key}', or leave it out of keys",
        )
    return scores[key]


def _accuracy(scores: SetScores, key: str) -> float:
    value = scores.exact_memorisation
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise NumericalError(
            f"exact memorisation {value} on set '{key}'", "a number from 0 to 1", "evaluate this model again"
        )
    return value


def _refuse_non_finite(losses: NDArray[np.float64]) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise NumericalError(
            f"{bad.size} of {losses.size} record losses not finite (first at position {bad[0]})",
            "finite losses",
            "the model overflows or is destroyed; use float32, or a larger solver.cubic_coefficient",
        )
