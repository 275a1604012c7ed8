"""Inner products and random vectors on flat shards: the `VectorSpace` of the solvers."""

from collections.abc import Sequence

import torch

from distributed_unlearn.curvature.layout import FlatLayout, shard_of
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
