"""Evidence: rows per prediction that are sorted, picked and summed by record, asked for in calls of bounded size."""

import numpy as np
import pytest

from distributed_unlearn.rounds.evaluate import score
from distributed_unlearn.workers.evidence import PredictionEvidence
from distributed_unlearn.workers.messages import RecordScores


def evidence_of(counts):
    """`counts` maps a record to its number of predictions; prediction k of record r has nll 10 r + k."""
    indices, num_tokens = np.array(list(counts), dtype=np.int64), np.array(list(counts.values()), dtype=np.int64)
    nll = np.array([10.0 * record + k for record, count in counts.items() for k in range(count)])
    return PredictionEvidence(indices, num_tokens, nll, -nll, nll % 2 == 0)


def test_parts_are_joined_in_the_order_of_records():
    whole = PredictionEvidence.joined([evidence_of({7: 2, 1: 1}), evidence_of({3: 3}), evidence_of({})])
    assert whole.indices.tolist() == [1, 3, 7] and whole.num_tokens.tolist() == [1, 3, 2]
    assert whole.nll.tolist() == [10, 30, 31, 32, 70, 71] == (-whole.log_odds).tolist()
    picked = whole.of(np.array([7, 1]))
    assert picked.nll.tolist() == [70, 71, 10] and picked.num_tokens.tolist() == [2, 1]
    sums = whole.per_record()
    assert sums.nll.tolist() == [10, 93, 141] and sums.num_correct.tolist() == [1, 2, 1]
    assert sums.nll.dtype == np.float64 and sums.num_correct.dtype == np.int64
    assert len(PredictionEvidence.joined([]).per_record().indices) == 0


def test_no_record_is_in_two_parts_and_none_is_made_up():
    with pytest.raises(AssertionError, match="in two parts"):
        PredictionEvidence.joined([evidence_of({1: 1}), evidence_of({1: 1})])
    with pytest.raises(AssertionError, match="without evidence"):
        evidence_of({1: 1, 4: 2}).of(np.array([2]))


class CountingWorkers:
    """Two ranks whose scores are the record numbers; notes how many records each call covers."""

    world_size = 2

    def __init__(self):
        self.sizes = []

    def score(self, indices, micro_batch_size):
        assert micro_batch_size == 1
        self.sizes.append(len(indices))
        return RecordScores(indices, indices * 2.0, indices + 1, indices)


@pytest.mark.parametrize(("num_records", "sizes"), [(0, [0]), (1, [1]), (128, [128]), (300, [128, 128, 44])])
def test_a_set_is_scored_in_calls_of_bounded_size(num_records, sizes):
    """A call may take `call_timeout_seconds`: its work may not grow with the set."""
    workers = CountingWorkers()
    muddled = np.random.default_rng(0).permutation(np.concatenate([np.arange(num_records)] * 2))
    found = score(workers, muddled, 1)
    assert workers.sizes == sizes
    assert found.indices.tolist() == list(range(num_records)) and (found.nll == 2 * found.indices).all()
