"""Full tensors of one segment at a time, from flat shards, through two collectives.

The passes in `linearisation` ask a `SegmentStore` for a segment's weights and tangents and hand it the segment's
results, once for all micro-batches of a pass; whether weights are partitioned (ZeRO-3) or replicated (stages 0 to
2), and over how many ranks, is decided here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from distributed_unlearn.curvature.layout import (
    FlatLayout,
    SegmentLayout,
    add_to_rows,
    empty_rows,
    unpack,
    zero_frozen_rows,
)


class Collectives(Protocol):
    """The collectives that sharded curvature needs. All ranks must call each of them together."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def all_gather(self, local: torch.Tensor) -> torch.Tensor:
        """[n] on every rank -> [world_size * n], in rank order."""
        ...

    def reduce_scatter(self, full: torch.Tensor) -> torch.Tensor:
        """[world_size * n] on every rank -> this rank's [n] of the sum over ranks."""
        ...

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, a new tensor; the argument is left alone."""
        ...


class WeightSource(Protocol):
    """Where a segment's full weights come from."""

    def segment_weights(self, segment: SegmentLayout) -> dict[str, torch.Tensor]:
        """Full parameters in the compute dtype, by name within the segment. All ranks must call this."""
        ...


class SegmentSum:
    """Full-size results of one segment, summed over micro-batches in the dtype of the vector that they go to.

    Allocated by the first result. The sum over this rank's micro-batches comes before the sum over ranks, so that
    a pass scatters a segment once.

    Args:
        part: the segment.
        world_size: number of ranks.
        into: this rank's part of the vector that the results are added to.
    """

    def __init__(self, part: SegmentLayout, world_size: int, into: torch.Tensor) -> None:
        self._part, self._world_size, self._into = part, world_size, into
        self._rows: torch.Tensor | None = None

    def add(self, results: Sequence[torch.Tensor | None]) -> None:
        """Add one micro-batch's results, in the order of the segment's trainable parameters; None is zero."""
        for slot, result in zip(self._part.trainable, results, strict=True):
            if result is not None:
                add_to_rows(self._allocated(), slot, result.detach())

    def _allocated(self) -> torch.Tensor:
        if self._rows is None:
            self._rows = empty_rows(self._part.trainable, self._world_size, self._into)
        return self._rows

    def scatter(self, collectives: Collectives) -> None:
        """Add the sum over ranks to this rank's part of the vector. All ranks must call this."""
        if not self._part.trainable:
            return
        rows, self._rows = self._allocated(), None
        zero_frozen_rows(rows, self._part.trainable)
        self._into[self._part.start : self._part.stop] += collectives.reduce_scatter(rows.view(-1))


@dataclass(frozen=True)
class SegmentStore:
    """Gathers a segment's weights and tangents, scatters its gradient and products."""

    layout: FlatLayout
    collectives: Collectives
    source: WeightSource
    compute_dtype: torch.dtype

    def weights(self, segment: int) -> dict[str, torch.Tensor]:
        """Full weights of a segment, compute dtype. All ranks must call this."""
        return self.source.segment_weights(self.layout.segments[segment])

    def trainable(self, segment: int) -> tuple[str, ...]:
        """Names of the segment's trainable parameters, in the order of the flat vector."""
        return tuple(slot.name for slot in self.layout.segments[segment].trainable)

    def tangent(self, segment: int, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Full slice of a parameter vector, compute dtype, frozen rows zeroed. All ranks must call this."""
        part = self.layout.segments[segment]
        if not part.trainable:
            return {}
        gathered = self.collectives.all_gather(vector[part.start : part.stop].to(self.compute_dtype))
        full = unpack(gathered, part.trainable, self.layout.world_size)
        for slot in part.trainable:
            if slot.frozen_row is not None:
                full[slot.name] = full[slot.name].clone()
                full[slot.name][slot.frozen_row] = 0
        return full

    def sum_of(self, segment: int, into: torch.Tensor) -> SegmentSum:
        """An empty sum of the segment's results; scattering it adds to `into`, this rank's part of a vector."""
        return SegmentSum(self.layout.segments[segment], self.layout.world_size, into)
