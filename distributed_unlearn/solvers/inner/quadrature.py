"""Lanczos from random starts on the shards: what stochastic Lanczos quadrature is made from."""

from dataclasses import dataclass

import torch

from distributed_unlearn.solvers.inner.krylov import LanczosBasis
from distributed_unlearn.solvers.problem import StepProblem


class QuadratureShard:
    """`advance(k)` begins anew at random vector k, `advance()` goes on; both take one Lanczos step, one product."""

    def __init__(self, problem: StepProblem) -> None:
        self._problem = problem
        self._basis: LanczosBasis | None = None

    def advance(self, *values: float) -> tuple[float, ...]:
        """The entries of a `KrylovEntry`. All ranks must call this."""
        problem = self._problem
        if values:
            self._basis = None  # its vectors go before new ones come
            start = problem.space.random_normal(problem.gradient, problem.seed + 1 + int(values[0]))
            self._basis = LanczosBasis(problem.space, problem.product, start)
        assert self._basis is not None, "advance without a random vector"
        entry = self._basis.extend()
        return entry.diagonal, entry.off_diagonal

    def candidate(self, *values: float) -> torch.Tensor:
        """No update."""
        return torch.zeros_like(self._problem.gradient)

    def accept(self) -> None:
        """Nothing is remembered."""


@dataclass(frozen=True)
class QuadratureSpec:
    """Krylov spaces that start at random vectors, one at a time."""

    measures_trials: bool = False
    separates_roles: bool = False

    def start(self, problem: StepProblem) -> QuadratureShard:
        """See `InnerSpec.start`."""
        return QuadratureShard(problem)
