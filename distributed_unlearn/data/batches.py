"""What the engine asks of any kind of records: tokens, or images with a class."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PredictionBatch:
    """B records for one forward pass, and the N predictions that are wanted of it."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model's forward."""
    positions: Tensor | None
    """[N], int64, unique: the rows of the model's logits, flattened to [B * T, V], that make the predictions. None:
    the model returns one row of logits [B, V] a record."""
    labels: Tensor
    """[N], int64."""
    record: Tensor
    """[N], int64, non-decreasing: the row of `inputs` that each prediction belongs to."""
    num_rows: int
    """B; at least 1, since a batch of no records still has one row, which predicts nothing."""

    def to(self, device: torch.device) -> "PredictionBatch":
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        positions = None if self.positions is None else self.positions.to(device)
        labels, record = self.labels.to(device), self.record.to(device)
        return PredictionBatch(moved, positions, labels, record, self.num_rows)


class Corpus(Protocol):
    """Records by number, as workers hold them: no ids, no text."""

    @property
    def num_records(self) -> int:
        """Number of records."""
        ...

    @property
    def largest_token_id(self) -> int | None:
        """Of all records; None where records are not tokens."""
        ...

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """What a record costs in a forward pass, by which records of like size are put together: int64."""
        ...

    def num_answer_tokens(self, indices: np.ndarray) -> np.ndarray:
        """Predictions per record, at least 1: int64, the shape of `indices`."""
        ...

    def batch(self, indices: np.ndarray) -> PredictionBatch:
        """The records `indices` in this order, on the CPU; of none, one row that predicts nothing.

        The predictions of a record are always the same ones in the same order.
        """
        ...


class NamedCorpus(Corpus, Protocol):
    """Records by number, as the driver holds them: with their ids."""

    @property
    def record_ids(self) -> tuple[str, ...]:
        """Every record's id."""
        ...

    @property
    def subject_ids(self) -> tuple[str | None, ...]:
        """Whose record it is, where the data say so."""
        ...

    def without_ids(self) -> Corpus:
        """What workers need: they never read an id, and so are sent none."""
        ...
