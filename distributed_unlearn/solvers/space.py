"""Parameter vectors in pieces: what solvers may do with them beyond local arithmetic.

Vectors are 1-D `torch.Tensor`s. On a sharded model each rank holds its own part of every vector; local arithmetic
(axpy, scaling) needs no communication, inner products do, so inner products are what a `VectorSpace` has to provide
(and, for an explicit Hessian, a whole vector in one place).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

HessianOperator = Callable[[torch.Tensor], torch.Tensor]
"""`v -> H v`, both the local part of a parameter vector. All ranks must call it together."""


class VectorSpace(Protocol):
    """Inner products of (possibly sharded) parameter vectors."""

    @property
    def num_entries(self) -> int:
        """Entries of a whole vector, padding excluded."""
        ...

    def dots(self, rows: Sequence[torch.Tensor], x: torch.Tensor) -> list[float]:
        """`[<row, x> for row in rows]`, summed over all ranks in one reduction. All ranks must call this."""
        ...

    def random_normal(self, like: torch.Tensor, seed: int) -> torch.Tensor:
        """Standard normal vector that depends on `seed` alone, never on the number of ranks."""
        ...

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """The whole vector [num_entries] on rank 0, in an order that no layout changes; None elsewhere.

        All ranks must call this.
        """
        ...

    def scatter(self, full: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """The reverse of `gather`: this rank's part of rank 0's vector. All ranks must call this."""
        ...

    def broadcast(self, values: Sequence[float], count: int) -> list[float]:
        """Rank 0's `count` values on every rank; what the others give is not looked at. All ranks must call this."""
        ...
