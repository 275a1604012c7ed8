"""The cubic model on a Krylov space: a Lanczos basis `Q'HQ = T` on the shards, a search on `T` at the driver.

Full reorthogonalisation. Vectors stay where they are (sharded over ranks); only inner products are reduced, two
reductions per extension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distributed_unlearn.solvers.cubic import solve_cubic_tridiagonal
from distributed_unlearn.solvers.inner.proposal import NO_PROPOSAL, Proposal
from distributed_unlearn.solvers.problem import StepProblem
from distributed_unlearn.solvers.protocols import StepOracle, StepStart, Trial
from distributed_unlearn.solvers.solution import Result
from distributed_unlearn.solvers.space import HessianOperator, VectorSpace

_BREAKDOWN_EPSILONS = 32.0  # two Gram-Schmidt passes leave a few eps ||Hq|| of rounding; nothing below this is signal


@dataclass(frozen=True)
class KrylovEntry:
    """One Lanczos step: column j of the tridiagonal `T = Q'HQ`."""

    diagonal: float
    """`<q_j, H q_j>`."""
    off_diagonal: float
    """`beta_j = ||r_j||` of the residual that gives `q_{j+1}`; 0 when the space is invariant (breakdown)."""


class LanczosBasis:
    """Orthonormal `q_1 = start/||start||, q_2, ...`, grown by one exact product at a time.

    Classical Gram-Schmidt applied twice ("twice is enough", Giraud, Langou, Rozloznik 2005) against all vectors, each
    pass one reduction. The squared norm of the vector travels in the same reduction: after the second pass
    `beta^2 = ||w||^2 - ||c||^2` with `c` the second pass's coefficients, which are rounding-sized, so nothing cancels
    unless the space is invariant. The diagonal of `T` is the sum of both passes' last coefficients.

    All ranks must call every method. One reduction here, two per `extend`, none in `combine`.
    """

    def __init__(self, space: VectorSpace, operator: HessianOperator, start: torch.Tensor) -> None:
        """Take `start` (the gradient), shape (local size,), as the first direction.

        Raises:
            ValueError: `start` is zero or not finite; the caller checks `gradient_norm` first.
        """
        squared = space.dots([start], start)[0]
        if not (squared > 0.0 and math.isfinite(squared)):
            raise ValueError(f"got a start vector with squared norm {squared}; expected a positive finite one")
        self._space, self._operator = space, operator
        self._vectors = [start / math.sqrt(squared)]
        self._num_products = 0
        self._closed = False

    @property
    def vectors(self) -> tuple[torch.Tensor, ...]:
        """Local parts of `q_1, q_2, ...`: one more than `num_products`, or as many after a breakdown."""
        return tuple(self._vectors)

    @property
    def num_products(self) -> int:
        """Exact products so far, the dimension of `T`."""
        return self._num_products

    @property
    def exhausted(self) -> bool:
        """True after a breakdown or a product that was not finite; `extend` then raises."""
        return self._closed

    def extend(self) -> KrylovEntry:
        """One exact product `H q_j`: the next column of `T`, and `q_{j+1}` unless the space is invariant.

        All ranks must call this.

        Returns:
            `<q_j, H q_j>` and `beta_j = ||(I - QQ') H q_j||`, the latter 0.0 when it is below 32 machine epsilons
            (of the vectors' dtype) times `||H q_j||`: a breakdown. Both NaN when the product is not finite; decide
            from the entry, which is the same on all ranks.

        Raises:
            RuntimeError: the space was exhausted by an earlier call.
        """
        if self._closed:
            raise RuntimeError(
                f"the Krylov space of dimension {self._num_products} is exhausted (the last off_diagonal was 0 or "
                "NaN); solve on it as it is"
            )
        product = self._operator(self._vectors[-1])
        self._num_products += 1
        first = self._space.dots([*self._vectors, product], product)
        if not all(math.isfinite(value) for value in first):
            self._closed = True
            return KrylovEntry(math.nan, math.nan)
        # out of place once: the product belongs to the operator, which may reuse its memory
        w = torch.add(product, self._vectors[0], alpha=-first[0])
        for q, coefficient in zip(self._vectors[1:], first[1:-1], strict=True):
            w.add_(q, alpha=-coefficient)
        second = self._space.dots([*self._vectors, w], w)
        for q, coefficient in zip(self._vectors, second[:-1], strict=True):
            w.add_(q, alpha=-coefficient)
        beta = math.sqrt(max(0.0, second[-1] - sum(c * c for c in second[:-1])))
        diagonal = first[-2] + second[-2]
        if beta <= _BREAKDOWN_EPSILONS * torch.finfo(w.dtype).eps * math.sqrt(first[-1]):
            self._closed = True
            return KrylovEntry(diagonal, 0.0)
        self._vectors.append(w.div_(beta))
        return KrylovEntry(diagonal, beta)

    def combine(self, coefficients: Sequence[float]) -> torch.Tensor:
        """Local part of `sum_j coefficients[j] q_j`; no communication.

        Raises:
            ValueError: no coefficient, or more than there are vectors.
        """
        if not 0 < len(coefficients) <= len(self._vectors):
            raise ValueError(f"got {len(coefficients)} coefficients; expected 1 to {len(self._vectors)}")
        total = self._vectors[0] * coefficients[0]
        for q, coefficient in zip(self._vectors[1:], coefficients[1:], strict=False):
            total.add_(q, alpha=coefficient)
        return total


class KrylovShard:
    """`advance()` is one Lanczos step (one exact product); `candidate(*y)` is `sum_j y_j q_j`."""

    def __init__(self, problem: StepProblem) -> None:
        self._problem = problem
        self._basis: LanczosBasis | None = None

    def advance(self, *values: float) -> tuple[float, ...]:
        """The entries of a `KrylovEntry`. All ranks must call this."""
        if self._basis is None:
            self._basis = LanczosBasis(self._problem.space, self._problem.product, self._problem.gradient)
        entry = self._basis.extend()
        return entry.diagonal, entry.off_diagonal

    def candidate(self, *values: float) -> torch.Tensor:
        """The update with these coordinates in the basis."""
        assert self._basis is not None, "candidate before advance"
        return self._basis.combine(values)

    def accept(self) -> None:
        """Nothing is remembered."""


@dataclass(frozen=True)
class KrylovSpec:
    """A Krylov space that starts at the gradient."""

    measures_trials: bool = True
    separates_roles: bool = False

    def start(self, problem: StepProblem) -> KrylovShard:
        """See `InnerSpec.start`."""
        return KrylovShard(problem)


class KrylovInner:
    """Grows `T` by one product at a time until the model's residual is small; another M afterwards costs nothing.

    A Krylov space only ever sees curvature that the gradient has a component along, so a breakdown with `H`
    indefinite elsewhere goes unnoticed; with stochastic gradients that has probability zero.
    """

    def __init__(self, oracle: StepOracle, max_steps: int, tolerance: float) -> None:
        self._oracle, self._max_steps, self._tolerance = oracle, max_steps, tolerance
        self.spec = KrylovSpec()
        self.num_products = self.num_krylov_steps = 0

    def begin(self, start: StepStart) -> None:
        """A new step; the space of the last one is forgotten."""
        self._gradient_norm = start.metric_gradient_norm
        self._diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._coefficients: Sequence[float] = ()
        self.num_products = self.num_krylov_steps = 0

    def propose(self, cubic_coefficient: float) -> Proposal:
        """Minimise on `T`; the first call builds `T`, later ones never extend it."""
        growing = not self._diagonal
        while growing:
            diagonal, off_diagonal = self._oracle.advance()
            self.num_products += 1
            self.num_krylov_steps += 1
            self._diagonal.append(diagonal)
            self._off_diagonal.append(off_diagonal)
            proposal = self._solve(cubic_coefficient)
            growing = proposal.result is Result.max_krylov_steps and self.num_krylov_steps < self._max_steps
        return self._solve(cubic_coefficient)

    def _solve(self, cubic_coefficient: float) -> Proposal:
        solution = solve_cubic_tridiagonal(self._diagonal, self._off_diagonal, self._gradient_norm, cubic_coefficient)
        if solution.result is Result.nonfinite:
            return NO_PROPOSAL
        self._coefficients = solution.coefficients
        residual = solution.residual_norm / self._gradient_norm
        result = solution.result
        if self._off_diagonal[-1] == 0.0:
            result = Result.krylov_exhausted if result is Result.successful else result
        elif residual > self._tolerance:
            result = Result.max_krylov_steps
        return Proposal(
            alpha=solution.alpha,
            gamma=solution.gamma,
            predicted_reduction=solution.predicted_reduction,
            curvature=self._curvature(),
            residual=residual,
            smallest_ritz_value=solution.eigenvalues[0],
            largest_ritz_value=solution.eigenvalues[-1],
            result=result,
        )

    def _curvature(self) -> float:
        """`y'Ty` of the last solution."""
        y = self._coefficients
        return sum(d * c * c for d, c in zip(self._diagonal, y, strict=True)) + 2.0 * sum(
            beta * a * b for beta, a, b in zip(self._off_diagonal, y, y[1:], strict=False)
        )

    def attempt(self) -> Trial:
        """Apply the last proposal tentatively."""
        return self._oracle.candidate(*self._coefficients)
