"""What a solver may ask of a model: two protocols, one where the vectors live and one where only scalars do.

Vectors are 1-D `torch.Tensor`s. On a sharded model each rank holds its own part of every vector; local
arithmetic (axpy, scaling) needs no communication, inner products do, so inner products are the only thing a
`VectorSpace` has to provide. `StepOracle` is the same mathematics seen from the driver: vectors stay where
they are, floats come back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

HessianOperator = Callable[[torch.Tensor], torch.Tensor]
"""`v -> H v`, both the local part of a parameter vector. All ranks must call it together."""


class VectorSpace(Protocol):
    """Inner products of (possibly sharded) parameter vectors."""

    def dots(self, rows: Sequence[torch.Tensor], x: torch.Tensor) -> list[float]:
        """`[<row, x> for row in rows]`, summed over all ranks in one reduction. All ranks must call this."""
        ...

    def random_normal(self, like: torch.Tensor, seed: int) -> torch.Tensor:
        """Standard normal vector that depends on `seed` alone, never on the number of ranks."""
        ...


@dataclass(frozen=True)
class StepStart:
    """The objective at the current weights on the step's gradient minibatch."""

    loss: float
    """Objective, nats per token scale."""
    gradient_norm: float
    """`||g||`, Euclidean."""
    terms: dict[str, float]
    """The objective's parts by name, e.g. `retain_loss_nats_per_token`; for logs and stopping rules."""


@dataclass(frozen=True)
class KrylovEntry:
    """One Lanczos step: column j of the tridiagonal `T = Q'HQ`."""

    diagonal: float
    """`<q_j, H q_j>`."""
    off_diagonal: float
    """`beta_j = ||r_j||` of the residual that gives `q_{j+1}`; 0 when the space is invariant (breakdown)."""


@dataclass(frozen=True)
class InnerDescentEntry:
    """One inner gradient-descent step on the cubic model; scalars at the iterate *before* the step."""

    update_norm: float
    """`||Delta||`."""
    gradient_dot: float
    """`<g, Delta>` with the unperturbed gradient."""
    curvature: float
    """`<Delta, H Delta>`."""
    residual_norm: float
    """`||g + H Delta + (M/2) ||Delta|| Delta||`, unperturbed."""


@dataclass(frozen=True)
class Trial:
    """The weights with a tentative update applied."""

    loss: float
    """Objective on the same gradient minibatch at `w + Delta`; may be NaN or infinite."""
    update_norm: float
    """`||Delta||` of the applied vector."""


class StepOracle(Protocol):
    """One stochastic step, driven by scalars.

    Order of calls: `begin_step`, then either `extend_krylov` any number of times and `try_krylov`, or
    `begin_descent`, `descend` and `try_descent`; each `try_*` is followed by exactly one of `accept` or
    `undo`; after `undo` another `try_*` of the same step is allowed.
    """

    def begin_step(self, step_index: int) -> StepStart:
        """Draw the minibatches of this step and compute the gradient; forget the previous step's vectors."""
        ...

    def extend_krylov(self) -> KrylovEntry:
        """One exact product on the curvature minibatch: orthonormal `q_1 = g/||g||, q_2, ...` grows by one."""
        ...

    def try_krylov(self, coefficients: Sequence[float]) -> Trial:
        """Apply `Delta = sum_j coefficients[j] q_j` tentatively and evaluate the objective."""
        ...

    def begin_descent(self, perturbation: float) -> None:
        """Set `Delta = 0`, `g~ = g + perturbation ||g|| zeta/||zeta||` with a fresh standard normal `zeta`."""
        ...

    def descend(self, cubic_coefficient: float, learning_rate: float) -> InnerDescentEntry:
        """`Delta <- Delta - eta (g~ + H Delta + (M/2) ||Delta|| Delta)`, one exact product."""
        ...

    def try_descent(self) -> Trial:
        """Apply the inner iterate `Delta` tentatively and evaluate the objective."""
        ...

    def undo(self) -> None:
        """Restore the weights before the tentative update, bit for bit."""
        ...

    def accept(self) -> None:
        """Keep the tentative update."""
        ...

    def first_order_step(self, step_index: int, learning_rate: float) -> StepStart:
        """One AdamW or SGD step (the worker holds the optimiser) on the step's minibatch; its loss before it."""
        ...
