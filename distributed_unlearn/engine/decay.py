"""Which weights decay: one rule for unlearning and training. Matrices do, but for an embedding's frozen row."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from distributed_unlearn.curvature.layout import shard_of
from distributed_unlearn.engine.model import OpenedModel


def decays(shape: Sequence[int]) -> bool:
    """Whether a parameter of this (full) shape decays: matrices do, vectors (norms, biases) do not."""
    return len(shape) > 1


@dataclass(frozen=True)
class RowRange:
    """The entries of one row of a parameter of `numel` entries."""

    begin: int
    end: int
    numel: int

    @classmethod
    def of(cls, shape: Sequence[int], row: int) -> "RowRange":
        """Those of `row` in a parameter of this (full) shape."""
        length = prod(shape[1:])
        return cls(row * length, (row + 1) * length, prod(shape))

    def zero_in(self, part: Tensor, rank: int) -> None:
        """Zero the row in the whole flattened parameter, or in the equal part of it that is `rank`'s."""
        start = 0 if part.numel() >= self.numel else rank * part.numel()
        part[max(self.begin - start, 0) : max(self.end - start, 0)] = 0.0


def decay_mask(opened: OpenedModel) -> Tensor:
    """Which entries of this rank's weights decay, as 0.0 and 1.0: [vector_numel], in the master's dtype.

    What `decays` says, but for the frozen row of an embedding and padding. All ranks get their own.
    """
    weights = opened.weights.master
    mask = torch.zeros_like(weights)
    for segment in opened.layout.segments:
        for slot in segment.trainable:
            if not decays(slot.shape):
                continue
            full = torch.ones(slot.numel, dtype=torch.bool)
            if slot.frozen_row is not None:
                RowRange.of(slot.shape, slot.frozen_row).zero_in(full, 0)
            begin = segment.start + slot.offset
            local = shard_of(full, slot, opened.communicator.rank, weights.dtype)
            mask[begin : begin + slot.shard_numel] = local.to(weights.device)
    return mask
