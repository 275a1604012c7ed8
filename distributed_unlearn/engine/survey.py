"""Teacher-forced surveys: what every prediction of some records is like, and how far it is from another model's."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.curvature.trace import LossOfLogits, LossShare
from distributed_unlearn.data.batches import Corpus, PredictionBatch
from distributed_unlearn.engine.inputs import NotedLogits, scoring_micro_batches
from distributed_unlearn.engine.kept_weights import KeptWeights
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.workers.messages import Indices
from distributed_unlearn.workers.survey import Survey

ROWS_AT_ONCE = 256
"""Predictions whose distributions are in float32 at a time, of both models where there are two."""
MICRO_BATCHES_PER_PASS = 8
"""Without a reference. With one it is one: the reference's logits of all of a pass are there until it ends."""


class _Described:
    """A `LossOfLogits` that describes every prediction, and returns zero."""

    def __init__(self, batch: PredictionBatch, reference: Tensor | None) -> None:
        self._labels, self._reference = batch.labels, reference
        self.columns: list[Tensor] = []
        """nll, hits, rank, entropy, variance, divergence: [N] each."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [N, V] -> zero."""
        parts = [self._describe(logits, start) for start in range(0, len(logits), ROWS_AT_ONCE)]
        empty = [logits.new_zeros(0, dtype=torch.float64)] * 6
        self.columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else empty
        return logits.new_zeros(())

    def _describe(self, logits: Tensor, start: int) -> list[Tensor]:
        rows, labels = logits[start : start + ROWS_AT_ONCE], self._labels[start : start + ROWS_AT_ONCE, None]
        log_p = torch.log_softmax(_wide(rows), 1)
        own = log_p.gather(1, labels)
        p = log_p.exp()
        mu = _expectation(p, log_p)
        variance = _expectation(p, (log_p - mu[:, None]).square())
        # As the argmax decides: the first of equal logits wins, so those before the label count where they are equal.
        before = torch.arange(rows.shape[1], device=rows.device)[None, :] < labels
        of_label = rows.gather(1, labels)
        rank = ((rows > of_label) | ((rows == of_label) & before)).sum(1)
        divergence = torch.full_like(mu, math.nan)
        if self._reference is not None:
            other = torch.log_softmax(_wide(self._reference[start : start + ROWS_AT_ONCE]), 1)
            divergence = jensen_shannon(log_p, other)
        found = [-own[:, 0], rank == 0, rank, -mu, variance, divergence]
        return [column.double() for column in found]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """`sum p values`, [N]; what has no probability adds nothing, whatever its value."""
    return torch.where(p > 0, p * values, 0).sum(1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`1/2 KL(p | m) + 1/2 KL(q | m)`, m the mean, nats: [N, V] twice -> [N]; never below 0."""
    middle = torch.logaddexp(log_p, log_q) - math.log(2.0)
    both = _expectation(log_p.exp(), log_p - middle) + _expectation(log_q.exp(), log_q - middle)
    return (both / 2).clamp_min(0)


def gather_survey(
    opened: OpenedModel, corpus: Corpus, indices: Indices, micro_batch_size: int, reference: KeptWeights | None
) -> Survey:
    """Each record seen once whatever the number of ranks; distributions are in memory for one pass at a time.

    Args:
        opened: The model at its current weights.
        corpus: The records.
        indices: Which of them, distinct.
        micro_batch_size: Records that go through the model at once.
        reference: What to tell the divergence to; None: nothing.

    Returns:
        Sorted by record, the same on every rank. All ranks must call this.
    """
    communicator, parts = opened.communicator, []
    pieces = scoring_micro_batches(corpus, indices, communicator.rank, communicator.world_size, micro_batch_size)
    step = MICRO_BATCHES_PER_PASS if reference is None else 1
    for start in range(0, len(pieces), step):
        parts.extend(_survey_of(opened, corpus, pieces[start : start + step], reference))
    return Survey.joined(communicator.gather_parts(parts))


def _survey_of(
    opened: OpenedModel, corpus: Corpus, pieces: list[Indices], reference: KeptWeights | None
) -> list[Survey]:
    """Of some micro-batches in one pass. All ranks must call this."""
    batches = [corpus.batch(chosen).to(opened.communicator.device) for chosen in pieces]
    others: list[Tensor | None] = [None] * len(batches)
    if reference is not None:
        with reference.in_place_of(opened) as store:
            noted = [NotedLogits() for _ in batches]
            _pass(opened, store, batches, noted)
            others = [note.logits for note in noted]
    described = [_Described(batch, other) for batch, other in zip(batches, others, strict=True)]
    _pass(opened, opened.store, batches, described)
    found = []
    for chosen, loss in zip(pieces, described, strict=True):
        counts = corpus.num_answer_tokens(chosen)
        nll, hits, rank, entropy, variance, divergence = (column.cpu().numpy() for column in loss.columns)
        whole = rank.astype(np.int64)
        found.append(Survey(chosen, counts, nll, hits.astype(np.bool_), whole, entropy, variance, divergence))
    return found


def _pass(
    opened: OpenedModel, store: SegmentStore, batches: list[PredictionBatch], losses: Sequence[LossOfLogits]
) -> None:
    """One forward pass. All ranks must call this."""
    shares = [LossShare(batch.inputs, loss, batch.positions) for batch, loss in zip(batches, losses, strict=True)]
    Linearisation(opened.segmented, store, shares).loss()
