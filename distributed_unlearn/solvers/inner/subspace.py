"""The cubic model on the span of the preconditioned gradient, or its two parts, and the last accepted steps.

The last steps are what the minibatches before this one had to say, as in momentum methods and in conjugate gradients;
the small cubic model decides how much of them to take, so there is no momentum coefficient. (Subspaces of this kind:
Yuan 2014, "A review on subspace methods for nonlinear optimization"; for Newton-like steps Cartis and Roberts 2023.)
One exact product a direction, two to four a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distributed_unlearn.solvers.cubic import solve_cubic_dense
from distributed_unlearn.solvers.inner.proposal import NO_PROPOSAL, Proposal
from distributed_unlearn.solvers.problem import Memory, StepProblem
from distributed_unlearn.solvers.protocols import StepOracle, StepStart, Trial
from distributed_unlearn.solvers.solution import Result

_DEPENDENT = 1e-5  # of a direction's length: less than this left after orthogonalisation is rounding in float32


def _step_name(age: int) -> str:
    return f"accepted step {age}"


def _remembered(memory: Memory, count: int) -> list[torch.Tensor]:
    """The last accepted updates of the weights, newest first, at most `count`."""
    names = [_step_name(age) for age in range(count)]
    return [memory.vectors[name] for name in names if name in memory.vectors]


class SubspaceShard:
    """Orthonormal `q_1 .. q_m` of `y = S^-1 Delta` coordinates; `advance()` is one product, `candidate(*y)` a sum.

    The first direction is `S g`, which is `P g` for the weights, or with `separates_roles` the forget records' part of
    it and the retain records' part, so that the model scales the two apart; then the remembered steps, newest first. A
    direction that the others contain is left out, or one that is zero: the retain part where the retain records' loss
    is stationary. Vectors kept: m directions, and `num_steps` remembered updates in the round's memory.
    """

    def __init__(self, problem: StepProblem, num_steps: int) -> None:
        self._problem, self._num_steps = problem, num_steps
        self._basis: list[torch.Tensor] = []
        self._num_products = 0
        self._tried: torch.Tensor | None = None

    def _build(self) -> None:
        problem = self._problem
        gradient_norm = problem.space.dots([problem.gradient], problem.gradient)[0] ** 0.5
        for part in problem.parts or (problem.gradient,):
            self._add(part, gradient_norm)  # a part that is rounding beside the other is no direction
        for step in _remembered(problem.memory, self._num_steps):
            self._add(problem.from_weights(step), 0.0)

    def _add(self, direction: torch.Tensor, least_length: float) -> None:
        """Gram-Schmidt, twice (Giraud, Langou, Rozloznik 2005); two to four reductions."""
        space, remaining = self._problem.space, direction.clone()
        length = max(space.dots([direction], direction)[0] ** 0.5, least_length)
        for _ in range(2 if self._basis else 0):
            for q, coefficient in zip(self._basis, space.dots(self._basis, remaining), strict=True):
                remaining.add_(q, alpha=-coefficient)
        left = space.dots([remaining], remaining)[0] ** 0.5
        if left > _DEPENDENT * length:
            self._basis.append(remaining.div_(left))

    def advance(self, *values: float) -> tuple[float, ...]:
        """For the next direction j: its `<g, q_j>` and the column `<q_1, H q_j> .. <q_m, H q_j>`, m + 1 floats.

        One exact product. All ranks must call this, at most m times.
        """
        if not self._basis:
            self._build()
        q = self._basis[self._num_products]
        self._num_products += 1
        product = self._problem.product(q)
        column = self._problem.space.dots(self._basis, product)
        return (self._problem.space.dots([self._problem.gradient], q)[0], *column)

    def candidate(self, *values: float) -> torch.Tensor:
        """The update with these coordinates in the basis."""
        assert len(values) == len(self._basis), "one coordinate a direction"
        total = self._basis[0] * values[0]
        for q, coefficient in zip(self._basis[1:], values[1:], strict=True):
            total.add_(q, alpha=coefficient)
        self._tried = total
        return total

    def accept(self) -> None:
        """Remember the update as the newest step."""
        assert self._tried is not None, "accept without a candidate"
        kept = [self._problem.to_weights(self._tried), *_remembered(self._problem.memory, self._num_steps)]
        for age, step in enumerate(kept[: self._num_steps]):
            self._problem.memory.vectors[_step_name(age)] = step


@dataclass(frozen=True)
class SubspaceSpec:
    """The gradient, whole or by role, and the last `num_steps` accepted steps."""

    num_steps: int = 1
    separates_roles: bool = False
    measures_trials: bool = True

    def start(self, problem: StepProblem) -> SubspaceShard:
        """See `InnerSpec.start`."""
        return SubspaceShard(problem, self.num_steps)


class SubspaceInner:
    """Collects the projected Hessian column by column, then minimises on it; another M afterwards costs nothing.

    The residual in the whole space is not measured: it would take the products' vectors.
    """

    num_krylov_steps = 0

    def __init__(self, oracle: StepOracle, num_steps: int, separates_roles: bool) -> None:
        self._oracle = oracle
        self.spec = SubspaceSpec(num_steps, separates_roles)
        self.num_products = 0

    def begin(self, start: StepStart) -> None:
        """A new step; the space of the last one is forgotten."""
        self._slopes: list[float] = []
        self._columns: list[Sequence[float]] = []
        self._coefficients: Sequence[float] = ()
        self.num_products = 0

    def propose(self, cubic_coefficient: float) -> Proposal:
        """Minimise `g'Qy + 1/2 y'(Q'HQ)y + (M/6) ||y||^3`, exactly; the first call does the products."""
        while not self._columns or len(self._columns) < len(self._columns[0]):
            slope, *column = self._oracle.advance()
            self.num_products += 1
            self._slopes.append(slope)
            self._columns.append(column)
        projected = torch.tensor(self._columns, dtype=torch.float64)
        projected = 0.5 * (projected + projected.T)  # the products' rounding is not symmetric
        solution = solve_cubic_dense(projected, torch.tensor(self._slopes, dtype=torch.float64), cubic_coefficient)
        if solution.result is Result.nonfinite:
            return NO_PROPOSAL
        self._coefficients = solution.coefficients
        y = torch.tensor(solution.coefficients, dtype=torch.float64)
        return Proposal(
            alpha=solution.alpha,
            gamma=solution.gamma,
            predicted_reduction=solution.predicted_reduction,
            curvature=float(y @ projected @ y),
            smallest_ritz_value=solution.eigenvalues[0],
            largest_ritz_value=solution.eigenvalues[-1],
            result=solution.result,
        )

    def attempt(self) -> Trial:
        """Apply the last proposal tentatively."""
        return self._oracle.candidate(*self._coefficients)
