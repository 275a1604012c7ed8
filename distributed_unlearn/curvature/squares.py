"""Squares of single records' gradients, summed over ranks: the diagonal of the empirical Fisher matrix on shards."""

from dataclasses import dataclass

import torch

from distributed_unlearn.curvature.store import Collectives, SegmentStore, SegmentSum


class SquaredSum(SegmentSum):
    """A segment's gradient on this rank, squared entry by entry before the sum over ranks.

    All parts of the gradient (a tied embedding has two) are added before the square. So a pass over one record a rank
    gives the sum of the records' squared gradients, at any ZeRO stage; over several it would give the square of a sum.
    """

    def scatter(self, collectives: Collectives) -> None:
        """Add the sum of squares over ranks to this rank's part of the vector. All ranks must call this."""
        if self._part.trainable:
            self._allocated().square_()
        super().scatter(collectives)


@dataclass(frozen=True)
class SquaringStore(SegmentStore):
    """A `SegmentStore` whose gradients are squared before they are reduced."""

    def sum_of(self, segment: int, into: torch.Tensor) -> SegmentSum:
        """An empty sum of the segment's gradient, squared when it is scattered."""
        return SquaredSum(self.layout.segments[segment], self.layout.world_size, into)
