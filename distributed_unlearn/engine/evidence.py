"""Teacher-forced evidence at the current weights, over all ranks: one row per prediction of every record."""

import numpy as np
import torch
from torch import Tensor

from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.curvature.trace import LossShare
from distributed_unlearn.data.batches import Corpus, PredictionBatch
from distributed_unlearn.engine.inputs import scoring_micro_batches
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.objectives.predictions import LabelledLogits
from distributed_unlearn.workers.evidence import PredictionEvidence
from distributed_unlearn.workers.messages import Indices, RecordScores

MICRO_BATCHES_PER_PASS = 8
"""Scored while a segment is gathered. Each holds a hidden state or three and its masks meanwhile: for all of them less
than one layer's attention weights of one."""


class _Noted:
    """A `LossOfLogits` that notes what every prediction is worth, and returns zero."""

    def __init__(self, batch: PredictionBatch) -> None:
        self._batch = batch
        self.columns: tuple[Tensor, Tensor, Tensor] = (torch.empty(0),) * 3
        """nll, log-odds and hits, [N] each."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [N, V] -> zero."""
        seen = LabelledLogits(logits, self._batch.labels)
        self.columns = (seen.nll, seen.log_odds, seen.hits)
        return logits.new_zeros(())


def gather_evidence(opened: OpenedModel, corpus: Corpus, indices: Indices, micro_batch_size: int) -> PredictionEvidence:
    """What every prediction of some records is worth, each record seen once whatever the number of ranks.

    Args:
        opened: the model at its current weights.
        corpus: the records.
        indices: which of them, distinct; the caller keeps the number small enough for one call.
        micro_batch_size: records that go through the model at once.

    Returns:
        Sorted by record, the same on every rank. All ranks must call this.
    """
    communicator, parts = opened.communicator, []
    pieces = scoring_micro_batches(corpus, indices, communicator.rank, communicator.world_size, micro_batch_size)
    for start in range(0, len(pieces), MICRO_BATCHES_PER_PASS):
        parts.extend(_evidence_of(opened, corpus, pieces[start : start + MICRO_BATCHES_PER_PASS]))
    return PredictionEvidence.joined(communicator.gather_parts(parts))


def _evidence_of(opened: OpenedModel, corpus: Corpus, pieces: list[Indices]) -> list[PredictionEvidence]:
    """Of some micro-batches in one pass. All ranks must call this."""
    batches = [corpus.batch(chosen).to(opened.communicator.device) for chosen in pieces]
    noted = [_Noted(batch) for batch in batches]
    shares = [LossShare(batch.inputs, loss, batch.positions) for batch, loss in zip(batches, noted, strict=True)]
    Linearisation(opened.segmented, opened.store, shares).loss()
    found = []
    for chosen, batch, loss in zip(pieces, batches, noted, strict=True):
        counts = corpus.num_answer_tokens(chosen)
        assert counts.sum() == len(batch.labels), "a batch whose predictions are not those of its records"
        nll, odds, hits = (column.cpu().numpy() for column in loss.columns)
        found.append(PredictionEvidence(chosen, counts, nll.astype(np.float64), odds.astype(np.float64), hits))
    return found


def score_records(opened: OpenedModel, corpus: Corpus, indices: Indices, micro_batch_size: int) -> RecordScores:
    """Score every record once, whatever the number of ranks; sorted by index. All ranks must call this."""
    return gather_evidence(opened, corpus, indices, micro_batch_size).per_record()
