"""Extraction strength and membership inference of the current weights: what a certificate says beside the losses."""

from collections.abc import Mapping

import numpy as np

from distributed_unlearn.evaluation.metrics.intervals import Interval, bootstrap_interval, mean_interval
from distributed_unlearn.evaluation.metrics.membership import mia_auc
from distributed_unlearn.evaluation.metrics.memorisation import extraction_strength, mean_losses
from distributed_unlearn.records import Estimate, Exposure
from distributed_unlearn.rounds.evaluate import evidence
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.evidence import PredictionEvidence
from distributed_unlearn.workers.messages import Indices


def measure_exposure(workers: Workers, forget: Indices, holdout: Indices, micro_batch_size: int) -> Exposure:
    """Attack the current weights: one more pass over both sets.

    Args:
        workers: With an open model.
        forget: Records that were to be forgotten, at least one.
        holdout: Records that were never trained on; may be empty.
        micro_batch_size: Of the pass.
    """
    found = evidence(workers, np.union1d(forget, holdout), micro_batch_size)
    asked = found.of(np.sort(forget))
    if not len(holdout):
        return Exposure(_extraction(asked), None, None)
    unseen = found.of(np.sort(holdout))
    losses = {name: mean_losses(part.nll, part.num_tokens) for name, part in (("forget", asked), ("holdout", unseen))}

    def area(drawn: Mapping[str, Indices]) -> float:
        return mia_auc(losses["forget"][drawn["forget"]], losses["holdout"][drawn["holdout"]])

    sizes = {name: len(values) for name, values in losses.items()}
    interval = bootstrap_interval(area, sizes)
    membership = _estimate(mia_auc(losses["forget"], losses["holdout"]), interval, len(forget))
    return Exposure(_extraction(asked), _extraction(unseen), membership)


def _extraction(found: PredictionEvidence) -> Estimate:
    strengths = extraction_strength(found.hits, found.num_tokens)
    return _estimate(float(strengths.mean()), mean_interval(strengths), len(strengths))


def _estimate(value: float, interval: Interval | None, num_records: int) -> Estimate:
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return Estimate(value, low, high, num_records)
