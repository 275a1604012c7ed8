"""Extraction strength and membership inference of a round, against counts by hand and brute force."""

import numpy as np
import pytest

from distributed_unlearn.rounds.exposure import measure_exposure
from distributed_unlearn.workers.evidence import PredictionEvidence


class _Workers:
    """Answers every record by a table; two ranks' worth of calls."""

    world_size = 2

    def __init__(self, table: dict[int, tuple[list[float], list[bool]]]) -> None:
        self._table = table
        self.asked: list[int] = []

    def evidence(self, indices: np.ndarray, micro_batch_size: int) -> PredictionEvidence:
        self.asked += [int(index) for index in indices]
        rows = [self._table[int(index)] for index in indices]
        nll = np.concatenate([np.array(row[0]) for row in rows])
        hits = np.concatenate([np.array(row[1]) for row in rows])
        return PredictionEvidence(indices, np.array([len(row[0]) for row in rows]), nll, -nll, hits)


TABLE = {
    3: ([0.1, 0.1, 0.1, 0.1], [True, True, True, True]),  # all of it
    5: ([2.0, 0.0], [False, True]),  # the second half
    7: ([3.0, 1.0, 5.0], [True, True, False]),  # nothing: not even the last token
    11: ([1.0], [True]),
    13: ([4.0, 4.0], [False, False]),
}


def test_of_a_few_records_by_hand():
    workers = _Workers(TABLE)
    found = measure_exposure(workers, np.array([7, 3, 5]), np.array([13, 11]), 2)  # type: ignore[arg-type]
    assert sorted(workers.asked) == [3, 5, 7, 11, 13], "one pass"
    assert found.extraction_strength.value == pytest.approx((0.0 + 1.0 + 0.5) / 3)
    assert found.extraction_strength.num_records == 3
    assert found.extraction_strength_holdout is not None and found.extraction_strength_holdout.num_records == 2
    losses, unseen = [0.1, 1.0, 3.0], [1.0, 4.0]
    pairs = [(loss < other) + 0.5 * (loss == other) for loss in losses for other in unseen]
    assert found.membership_auc is not None
    assert found.membership_auc.value == pytest.approx(sum(pairs) / len(pairs))
    assert found.membership_auc.low <= found.membership_auc.value <= found.membership_auc.high


def test_what_cannot_be_measured_is_none():
    found = measure_exposure(_Workers(TABLE), np.array([3]), np.array([], dtype=np.int64), 2)  # type: ignore[arg-type]
    assert found.extraction_strength_holdout is None and found.membership_auc is None
    assert found.extraction_strength.low is None and found.extraction_strength.high is None
