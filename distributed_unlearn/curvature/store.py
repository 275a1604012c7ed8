"""Full tensors of one segment at a time, from flat shards, through two collectives.

The passes in `linearisation` ask a `SegmentStore` for a segment's weights and tangents and hand it the
segment's results; whether weights are partitioned (ZeRO-3) or replicated (stages 0 to 2), and over how many
ranks, is decided here and nowhere else.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from distributed_unlearn.curvature.layout import FlatLayout, SegmentLayout, pack, unpack


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

    def accumulate(self, segment: int, full: dict[str, torch.Tensor | None], into: torch.Tensor) -> None:
        """Add the sum over ranks of `full` to this rank's part of `into`. All ranks must call this."""
        part = self.layout.segments[segment]
        if not part.trainable:
            return
        packed = pack(full, part.trainable, self.layout.world_size, into)
        into[part.start : part.stop] += self.collectives.reduce_scatter(packed)
