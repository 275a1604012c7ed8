"""The two inner solvers of a step as the driver sees them: each proposes an update for a given M and can try it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from distributed_unlearn.solvers.cubic import solve_cubic_tridiagonal
from distributed_unlearn.solvers.protocols import InnerDescentEntry, StepOracle, Trial
from distributed_unlearn.solvers.solution import Result


@dataclass(frozen=True)
class Proposal:
    """The minimiser (or last iterate) of the cubic model for one M; scalars only."""

    alpha: float | None
    gamma: float | None
    predicted_reduction: float | None
    residual: float | None
    """Cubic model's residual over `||g||`."""
    smallest_ritz_value: float | None
    largest_ritz_value: float | None
    result: Result


class InnerSolver(Protocol):
    """What `SCureNewton` needs of an inner solver, for one step."""

    num_products: int
    num_krylov_steps: int

    def propose(self, cubic_coefficient: float) -> Proposal:
        """Minimise the model with this M."""
        ...

    def attempt(self) -> Trial:
        """Apply the last proposal tentatively."""
        ...


class KrylovInner:
    """Grows `T` by one product at a time until the model's residual is small; another M afterwards costs nothing.

    A Krylov space only ever sees curvature that the gradient has a component along, so a breakdown with `H`
    indefinite elsewhere goes unnoticed; with stochastic gradients that has probability zero.
    """

    def __init__(self, oracle: StepOracle, gradient_norm: float, max_steps: int, tolerance: float) -> None:
        self._oracle, self._gradient_norm = oracle, gradient_norm
        self._max_steps, self._tolerance = max_steps, tolerance
        self._diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._coefficients: Sequence[float] = ()
        self.num_products = self.num_krylov_steps = 0

    def propose(self, cubic_coefficient: float) -> Proposal:
        """Minimise on `T`; the first call builds `T`, later ones never extend it."""
        growing = not self._diagonal
        while growing:
            entry = self._oracle.extend_krylov()
            self.num_products += 1
            self.num_krylov_steps += 1
            self._diagonal.append(entry.diagonal)
            self._off_diagonal.append(entry.off_diagonal)
            proposal = self._solve(cubic_coefficient)
            growing = proposal.result is Result.max_krylov_steps and self.num_krylov_steps < self._max_steps
        return self._solve(cubic_coefficient)

    def _solve(self, cubic_coefficient: float) -> Proposal:
        solution = solve_cubic_tridiagonal(self._diagonal, self._off_diagonal, self._gradient_norm, cubic_coefficient)
        if solution.result is Result.nonfinite:
            return Proposal(None, None, None, None, None, None, Result.nonfinite)
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
            residual=residual,
            smallest_ritz_value=solution.eigenvalues[0],
            largest_ritz_value=solution.eigenvalues[-1],
            result=result,
        )

    def attempt(self) -> Trial:
        """Apply the last proposal tentatively."""
        return self._oracle.try_krylov(self._coefficients)


class DescentInner:
    """The paper's inner loop: a fixed number of gradient-descent steps on the cubic model, redone for every M.

    The scalars of `descend` belong to the iterate before it, so one more call with a learning rate of 0 reads them at
    the final iterate: the predicted reduction is that of the very update that is tried. It costs no more than the
    paper's count, since the call at `Delta = 0` needs no product (see `InnerDescent.descend`): `num_steps` products
    per proposal.

    With `limits_rate` the learning rate is `min(eta, 1 / sqrt(M ||g||))`: the first iterate has length `eta ||g||` and
    the cubic term's curvature there is `M eta ||g||`, so a larger eta overshoots for that term alone, and a rejection,
    which raises M, would only make it worse. The objective's own curvature stays the user's concern.
    """

    num_krylov_steps = 0

    def __init__(
        self,
        oracle: StepOracle,
        gradient_norm: float,
        num_steps: int,
        learning_rate: float,
        perturbation: float,
        tolerance: float,
        limits_rate: bool,
    ) -> None:
        self._oracle, self._gradient_norm = oracle, gradient_norm
        self._num_steps, self._learning_rate, self._limits_rate = num_steps, learning_rate, limits_rate
        self._perturbation, self._tolerance = perturbation, tolerance
        self.num_products = 0

    def propose(self, cubic_coefficient: float) -> Proposal:
        """Run the inner loop from `Delta = 0`."""
        rate = self._learning_rate
        if self._limits_rate:
            rate = min(rate, 1.0 / math.sqrt(cubic_coefficient * self._gradient_norm))
        self._oracle.begin_descent(self._perturbation)
        for _ in range(self._num_steps):
            self._oracle.descend(cubic_coefficient, rate)
        self.num_products += self._num_steps
        return self._judge(cubic_coefficient, self._oracle.descend(cubic_coefficient, 0.0))

    def _judge(self, cubic_coefficient: float, entry: InnerDescentEntry) -> Proposal:
        norm = entry.update_norm
        predicted = -(entry.gradient_dot + 0.5 * entry.curvature + cubic_coefficient / 6.0 * norm**3)
        if not (math.isfinite(predicted) and math.isfinite(entry.residual_norm)):
            return Proposal(None, None, None, None, None, None, Result.nonfinite)
        residual = entry.residual_norm / self._gradient_norm
        result = Result.successful if residual <= self._tolerance else Result.max_inner_steps
        if predicted <= 0.0:
            result = Result.inner_not_descending
        return Proposal(norm, 0.5 * cubic_coefficient * norm, predicted, residual, None, None, result)

    def attempt(self) -> Trial:
        """Apply the last iterate tentatively."""
        return self._oracle.try_descent()
