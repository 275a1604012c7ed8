"""From a global minibatch to this rank's micro-batches and their shares of the objective.

A minibatch is drawn globally, cut by rank and then into micro-batches; every sum is divided by counts of the
*global* minibatch. So neither the number of ranks nor the micro-batch size can change a result.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_unlearn.curvature.trace import LossShare
from distributed_unlearn.data.batches import Corpus, PredictionBatch
from distributed_unlearn.data.sampling import cut, micro_batches, num_micro_batches
from distributed_unlearn.objectives.constants import RoundConstants, uniform_numbers
from distributed_unlearn.objectives.objective import Objective
from distributed_unlearn.objectives.predictions import Constants, MinibatchTotals, Predictions
from distributed_unlearn.workers.messages import Indices


@dataclass(frozen=True)
class Minibatch:
    """Records of one global minibatch, by role."""

    forget: Indices
    retain: Indices

    def __len__(self) -> int:
        return len(self.forget) + len(self.retain)

    def head(self, num_forget: int, num_retain: int) -> "Minibatch":
        """The first records of each role."""
        return Minibatch(self.forget[:num_forget], self.retain[:num_retain])


def minibatch_totals(corpus: Corpus, minibatch: Minibatch) -> MinibatchTotals:
    """Counts over the global minibatch, by which local sums are divided."""
    return MinibatchTotals(
        num_forget_records=len(minibatch.forget),
        num_retain_records=len(minibatch.retain),
        num_forget_tokens=int(corpus.num_answer_tokens(minibatch.forget).sum()),
        num_retain_tokens=int(corpus.num_answer_tokens(minibatch.retain).sum()),
    )


class MicroBatchLoss:
    """This rank's share of the objective on one micro-batch, as a function of the logits."""

    def __init__(
        self,
        batch: PredictionBatch,
        is_forget: Tensor,
        constants: Constants,
        objective: Objective,
        totals: MinibatchTotals,
    ) -> None:
        self._batch, self._is_forget, self._constants = batch, is_forget, constants
        self._objective, self._totals = objective, totals
        self._notes_log_odds = objective.forget_needs is not None and objective.forget_needs.target
        self.start_logits: Tensor | None = None
        """The batch's logits [N, V] at the round's first weights, where the objective reads them."""
        self.terms: dict[str, Tensor] = {}
        """The objective's parts at the last call, local shares; tensors: reading a number waits for the device."""
        self.log_odds: Tensor | None = None
        """[N]: those of the labels at the last call, where an objective over tokens was computed."""
        self.notes_records = False
        """Whether calls note what each record adds."""
        self.by_record: Tensor | None = None
        """[num_rows], float64, detached: what each record added at the last call that noted it."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [N, V] of the batch's predictions -> scalar."""
        batch = self._batch
        predictions = Predictions(
            logits, batch.labels, batch.record, self._is_forget, self._constants, self.start_logits
        )
        loss = self._objective(predictions, self._totals)
        self.terms = self._objective.terms(predictions, self._totals)
        self.log_odds = predictions.log_odds.detach() if self._notes_log_odds else None
        if self.notes_records:
            self.by_record = self._by_record(predictions)
        return loss

    def _by_record(self, predictions: Predictions) -> Tensor:
        """In float64 from the logits on: the rounding of sums does not enter differences of two calls."""
        with torch.no_grad():
            rows = range(self._batch.num_rows)  # one record's rows in float64 at a time
            return torch.stack([self._objective(predictions.alone(row), self._totals) for row in rows])


class NotedLogits:
    """A `LossOfLogits` that notes the logits and returns zero."""

    def __init__(self) -> None:
        self.logits: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [N, V] -> zero."""
        self.logits = logits.detach()
        return logits.new_zeros(())


@dataclass(frozen=True)
class MicroBatch:
    """Model inputs and loss of one micro-batch on this rank."""

    records: Indices
    """Empty where the batch has but one row that predicts nothing."""
    batch: PredictionBatch
    loss: MicroBatchLoss

    @property
    def share(self) -> LossShare:
        """As a linearisation takes it."""
        return LossShare(self.batch.inputs, self.loss, self.batch.positions)


def _known(
    constants: RoundConstants, corpus: Corpus, chosen: Indices, objective: Objective, device: torch.device
) -> Constants:
    """What the round knows of some records' predictions, in the order of their batch."""
    num_tokens = corpus.num_answer_tokens(chosen)
    columns = [*constants.rows(chosen, num_tokens)]
    if objective.forget_needs is not None and objective.forget_needs.uniform:
        columns.append(uniform_numbers(constants.label_seed, chosen, num_tokens))
    return Constants(*(torch.from_numpy(column).to(device) for column in columns))


def local_micro_batches(
    corpus: Corpus,
    minibatch: Minibatch,
    objective: Objective,
    constants: RoundConstants,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    device: torch.device,
    totals: MinibatchTotals | None = None,
) -> list[MicroBatch]:
    """This rank's micro-batches; the same number on every rank, some of them empty if need be.

    `totals` are the counts to divide by, where `minibatch` is a part of another one; None: its own.
    """
    totals = minibatch_totals(corpus, minibatch) if totals is None else totals
    parts = [(cut(minibatch.forget, r, world_size), cut(minibatch.retain, r, world_size)) for r in range(world_size)]
    count = max(1, *(-(-(len(forget) + len(retain)) // micro_batch_size) for forget, retain in parts))
    mine, num_forget = np.concatenate(parts[rank]), len(parts[rank][0])
    result = []
    for start, chosen in enumerate(micro_batches(mine, micro_batch_size, count)):
        positions = np.arange(len(chosen)) + start * micro_batch_size
        # An empty micro-batch still has one row (all padding), so that the rank can enter every collective.
        batch = corpus.batch(chosen).to(device)
        is_forget = torch.zeros(batch.num_rows, dtype=torch.bool)
        is_forget[: len(chosen)] = torch.from_numpy(positions < num_forget)
        known = _known(constants, corpus, chosen, objective, device)
        loss = MicroBatchLoss(batch, is_forget.to(device), known, objective, totals)
        result.append(MicroBatch(chosen, batch, loss))
    return result


def scoring_micro_batches(
    corpus: Corpus, indices: Indices, rank: int, world_size: int, micro_batch_size: int
) -> list[Indices]:
    """This rank's share of `indices`, records of similar length together; the same number of pieces on every rank."""
    ordered = indices[np.argsort(corpus.lengths(indices), kind="stable")]
    count = num_micro_batches(len(ordered), world_size, micro_batch_size)
    return micro_batches(ordered[rank::world_size], micro_batch_size, count)
