"""What a scoring pass finds out about every prediction of some records."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distributed_unlearn.objectives.constants import ragged_rows
from distributed_unlearn.workers.messages import Indices, RecordScores


@dataclass(frozen=True, eq=False)
class PredictionEvidence:
    """Teacher-forced evidence: R records, their N predictions end to end, each record's in the corpus's order."""

    indices: Indices
    """[R]: records; distinct."""
    num_tokens: Indices
    """[R]: predictions of each."""
    nll: NDArray[np.float64]
    """[N]: `-log p` of the label, nats."""
    log_odds: NDArray[np.float64]
    """[N]: `log p - log(1 - p)` of the label; see `objectives.token_terms.log_odds`."""
    hits: NDArray[np.bool_]
    """[N]: whether the arg max is the label."""

    def __post_init__(self) -> None:
        total = int(self.num_tokens.sum())
        assert len(self.indices) == len(self.num_tokens), "one count a record"
        assert total == len(self.nll) == len(self.log_odds) == len(self.hits), "one row a prediction"

    @classmethod
    def joined(cls, parts: Sequence["PredictionEvidence"]) -> "PredictionEvidence":
        """Parts of different records as one, sorted by record."""
        if not parts:
            none = np.empty(0, dtype=np.int64)
            return cls(none, none, none.astype(np.float64), none.astype(np.float64), none.astype(np.bool_))
        indices = np.concatenate([part.indices for part in parts])
        assert len(np.unique(indices)) == len(indices), "a record in two parts"
        whole = cls(
            indices,
            np.concatenate([part.num_tokens for part in parts]),
            np.concatenate([part.nll for part in parts]),
            np.concatenate([part.log_odds for part in parts]),
            np.concatenate([part.hits for part in parts]),
        )
        return whole._rows(np.argsort(indices, kind="stable"))

    def of(self, wanted: Indices) -> "PredictionEvidence":
        """The evidence of some of the records, in the order of `wanted`; this must be sorted by record."""
        at = np.searchsorted(self.indices, wanted)
        assert np.array_equal(self.indices[np.minimum(at, len(self.indices) - 1)], wanted), "records without evidence"
        return self._rows(at)

    def _rows(self, at: Indices) -> "PredictionEvidence":
        rows = ragged_rows(self.num_tokens, at)
        nll, odds, hits = self.nll[rows], self.log_odds[rows], self.hits[rows]
        return PredictionEvidence(self.indices[at], self.num_tokens[at], nll, odds, hits)

    def per_record(self) -> RecordScores:
        """Sums over each record's predictions, in the same order."""
        record = np.repeat(np.arange(len(self.indices)), self.num_tokens)
        nll = np.bincount(record, self.nll, minlength=len(self.indices)).astype(np.float64)
        correct = np.bincount(record, self.hits, minlength=len(self.indices)).astype(np.int64)
        return RecordScores(self.indices, nll, self.num_tokens, correct)
