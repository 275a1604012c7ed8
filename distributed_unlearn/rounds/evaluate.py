"""Scores of the current weights on named sets of records, each record scored once."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distributed_unlearn.evaluation.metrics import score_set
from distributed_unlearn.records import SetScores
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.evidence import PredictionEvidence

_MICRO_BATCHES_PER_CALL = 64
"""Of one scoring call, a rank: bounds its time, which is limited, and the rows that ranks send each other."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Per-record scores, sorted by `indices`."""

    indices: np.ndarray
    nll: np.ndarray
    num_tokens: np.ndarray
    num_correct: np.ndarray

    def of(self, chosen: np.ndarray) -> "Scores":
        """The scores of some of the records."""
        at = np.searchsorted(self.indices, chosen)
        return Scores(chosen, self.nll[at], self.num_tokens[at], self.num_correct[at])

    @property
    def mean_losses(self) -> np.ndarray:
        """Each record's mean answer loss, nats per token."""
        return self.nll / self.num_tokens

    @property
    def missed(self) -> np.ndarray:
        """Share of each record's answer tokens whose argmax is not the label."""
        return 1.0 - self.num_correct / self.num_tokens


def _calls(workers: Workers, indices: np.ndarray, micro_batch_size: int) -> list[np.ndarray]:
    """Distinct records in pieces of bounded work; one empty piece for none."""
    wanted, size = np.unique(indices), _MICRO_BATCHES_PER_CALL * micro_batch_size * workers.world_size
    return [wanted[start : start + size] for start in range(0, max(len(wanted), 1), size)]


def score(workers: Workers, indices: np.ndarray, micro_batch_size: int) -> Scores:
    """Score records on all ranks, in as many calls as it takes."""
    found = [workers.score(chosen, micro_batch_size) for chosen in _calls(workers, indices, micro_batch_size)]
    columns = [(part.indices, part.nll, part.num_tokens, part.num_correct) for part in found]
    return Scores(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def evidence(workers: Workers, indices: np.ndarray, micro_batch_size: int) -> PredictionEvidence:
    """Evidence of every prediction of some records on all ranks, in as many calls as it takes."""
    calls = _calls(workers, indices, micro_batch_size)
    return PredictionEvidence.joined([workers.evidence(chosen, micro_batch_size) for chosen in calls])


def evaluate_sets(
    workers: Workers, sets: Mapping[str, np.ndarray], micro_batch_size: int
) -> tuple[dict[str, SetScores], Scores]:
    """Scores of every non-empty set, and the per-record scores they come from."""
    scores = score(workers, np.concatenate(list(sets.values())), micro_batch_size)
    return summarise(sets, scores), scores


def summarise(sets: Mapping[str, np.ndarray], scores: Scores) -> dict[str, SetScores]:
    """Scores of every non-empty set, all of whose records are in `scores`."""
    parts = {name: scores.of(np.unique(indices)) for name, indices in sets.items() if len(indices)}
    return {name: score_set(part.nll, part.num_tokens, part.num_correct) for name, part in parts.items()}
