"""Inner products and random vectors on flat shards: the `VectorSpace` of the solvers."""

from collections.abc import Iterator, Sequence

import torch

from distributed_unlearn.curvature.layout import FlatLayout, SegmentLayout, shard_of, unpack
from distributed_unlearn.curvature.store import Collectives


class ShardedSpace:
    """Vectors as [vector_numel] tensors, one part a rank, padding zero (so that inner products need no mask)."""

    def __init__(self, layout: FlatLayout, collectives: Collectives) -> None:
        self._layout, self._collectives = layout, collectives
        self._chunk_numel = 1 << 24  # bounds the float64 copies at 256 MiB

    def dots(self, rows: Sequence[torch.Tensor], x: torch.Tensor) -> list[float]:
        """`[<row, x> for row in rows]`, accumulated in float64, one reduction. All ranks must call this.

        Each product of two fp32 entries is exact in float64, so the result depends on the number of ranks
        only through float64 rounding.
        """
        local = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
        for begin in range(0, x.numel(), self._chunk_numel):
            wide = x[begin : begin + self._chunk_numel].to(torch.float64)
            for index, row in enumerate(rows):
                local[index] += torch.dot(row[begin : begin + self._chunk_numel].to(torch.float64), wide)
        return self._collectives.all_reduce_sum(local).tolist()

    @property
    def num_entries(self) -> int:
        """Trainable parameters of the whole model, rows that are frozen included."""
        return self._layout.num_trainable

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """See `VectorSpace.gather`: parameters in the layout's order, each flattened. All ranks must call this."""
        full = self._collectives.all_gather(x)
        if self._collectives.rank != 0:
            return None
        parts = [
            parameter.reshape(-1)
            for segment, rows in self._segments(full)
            for parameter in unpack(rows, segment.trainable, self._layout.world_size).values()
        ]
        return torch.cat(parts)

    def _segments(self, full: torch.Tensor) -> Iterator[tuple[SegmentLayout, torch.Tensor]]:
        """Every segment's slice of a gathered vector, as the segment alone would have been gathered."""
        rows = full.view(self._layout.world_size, -1)
        for segment in self._layout.segments:
            yield segment, rows[:, segment.start : segment.stop].reshape(-1)

    def scatter(self, full: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """See `VectorSpace.scatter`. All ranks must call this."""
        count = self.num_entries
        given = full if full is not None and self._collectives.rank == 0 else torch.zeros(count)
        shared = self._collectives.all_reduce_sum(given.to(like.device, like.dtype))  # rank 0's: the others add zeros
        result, position = torch.zeros_like(like), 0
        for segment in self._layout.segments:
            for slot in segment.trainable:
                full = shared[position : position + slot.numel].view(slot.shape)
                if slot.frozen_row is not None:
                    full[slot.frozen_row] = 0
                part = shard_of(full, slot, self._collectives.rank, like.dtype)
                begin = segment.start + slot.offset
                result[begin : begin + slot.shard_numel] = part
                position += slot.numel
        return result

    def broadcast(self, values: Sequence[float], count: int) -> list[float]:
        """See `VectorSpace.broadcast`. All ranks must call this."""
        given = torch.zeros(count, dtype=torch.float64)
        if self._collectives.rank == 0:
            given += torch.tensor(values, dtype=torch.float64)
        return self._collectives.all_reduce_sum(given).tolist()

    def norm(self, x: torch.Tensor) -> float:
        """`||x||`, Euclidean. All ranks must call this."""
        return float(self.dots([x], x)[0] ** 0.5)

    def random_normal(self, like: torch.Tensor, seed: int) -> torch.Tensor:
        """Standard normal vector, a function of the seed alone: one full parameter is drawn at a time."""
        generator = torch.Generator().manual_seed(seed)
        result = torch.zeros_like(like)
        for segment in self._layout.segments:
            for slot in segment.trainable:
                full = torch.randn(slot.shape, generator=generator, dtype=torch.float32)
                if slot.frozen_row is not None:
                    full[slot.frozen_row] = 0
                begin = segment.start + slot.offset
                part = shard_of(full, slot, self._collectives.rank, like.dtype)
                result[begin : begin + slot.shard_numel] = part.to(like.device)
        return result
