"""The paper's inner solver: gradient descent on the cubic model; it keeps two vectors beside the gradient.

Bui et al., arXiv 2406.14507 (SCureNewton, the cubic sub-solver); the random perturbation of the gradient against the
hard case is that of Carmon and Duchi 2019 and of Tripuraneni et al. 2018, algorithm 3. We scale it by `||g||`, so that
`perturbation` is a pure number.
"""

import math
from dataclasses import dataclass

import torch

from distributed_unlearn.solvers.inner.proposal import NO_PROPOSAL, Proposal
from distributed_unlearn.solvers.problem import StepProblem
from distributed_unlearn.solvers.protocols import StepOracle, StepStart, Trial
from distributed_unlearn.solvers.solution import Result
from distributed_unlearn.solvers.space import HessianOperator, VectorSpace

_MAX_SHRINKS = 8  # of the rate within a step; each divides it by 4, together by 65,000


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


class InnerDescent:
    """Iterates `Delta <- Delta - eta (g~ + H Delta + (M/2) ||Delta|| Delta)` from `Delta = 0`.

    `g~ = g + perturbation ||g|| zeta/||zeta||`, `zeta` standard normal. All ranks must call every method.
    """

    def __init__(
        self, space: VectorSpace, operator: HessianOperator, gradient: torch.Tensor, perturbation: float, seed: int
    ) -> None:
        """Draw `zeta` from `seed` (the same on all ranks) and set `Delta = 0`.

        Raises:
            ValueError: a negative `perturbation`.
        """
        if not perturbation >= 0.0:
            raise ValueError(f"got perturbation {perturbation}; expected 0 or more")
        self._space, self._operator, self._gradient = space, operator, gradient
        self._perturbed = gradient
        if perturbation > 0.0:
            zeta = space.random_normal(gradient, seed)
            gradient_norm = math.sqrt(space.dots([gradient], gradient)[0])
            zeta_norm = math.sqrt(space.dots([zeta], zeta)[0])
            self._perturbed = torch.add(gradient, zeta, alpha=perturbation * gradient_norm / zeta_norm)
        self.restart()

    def restart(self) -> None:
        """Set `Delta = 0` again, the perturbation unchanged."""
        self._update = torch.zeros_like(self._gradient)
        self._at_zero = True

    @property
    def update(self) -> torch.Tensor:
        """Local part of the current `Delta`; it changes with the next `descend`."""
        return self._update

    def descend(self, cubic_coefficient: float, learning_rate: float) -> InnerDescentEntry:
        """One inner step; the scalars are those of the iterate before it. All ranks must call this.

        One exact product and two reductions, but no product at `Delta = 0`, where `H Delta = 0`: k calls cost k - 1
        products. `learning_rate = 0` reads the scalars without moving.

        Args:
            cubic_coefficient: `M >= 0`.
            learning_rate: `eta >= 0`.
        """
        update, gradient, space = self._update, self._gradient, self._space
        product = torch.zeros_like(update) if self._at_zero else self._operator(update)
        squared, gradient_dot, curvature = space.dots([update, gradient, product], update)
        update_norm = math.sqrt(squared)
        model_gradient = torch.add(product, update, alpha=0.5 * cubic_coefficient * update_norm)
        residual = gradient + model_gradient
        residual_norm = math.sqrt(space.dots([residual], residual)[0])
        if learning_rate > 0.0:
            self._update = update - learning_rate * (self._perturbed + model_gradient)
            self._at_zero = False
        return InnerDescentEntry(update_norm, gradient_dot, curvature, residual_norm)


class DescentShard:
    """`advance()` starts again from zero, `advance(M, eta)` is one inner step; `candidate()` is the iterate."""

    def __init__(self, problem: StepProblem, perturbation: float) -> None:
        self._problem, self._perturbation = problem, perturbation
        self._descent: InnerDescent | None = None

    def advance(self, *values: float) -> tuple[float, ...]:
        """The fields of an `InnerDescentEntry`, or nothing. All ranks must call this."""
        if self._descent is None:
            problem = self._problem
            self._descent = InnerDescent(
                problem.space, problem.product, problem.gradient, self._perturbation, problem.seed
            )
        if not values:
            self._descent.restart()
            return ()
        cubic_coefficient, learning_rate = values
        entry = self._descent.descend(cubic_coefficient, learning_rate)
        return entry.update_norm, entry.gradient_dot, entry.curvature, entry.residual_norm

    def candidate(self, *values: float) -> torch.Tensor:
        """The current iterate."""
        assert self._descent is not None, "candidate before advance"
        return self._descent.update

    def accept(self) -> None:
        """Nothing is remembered."""


@dataclass(frozen=True)
class DescentSpec:
    """Gradient descent on the cubic model."""

    perturbation: float
    measures_trials: bool = True
    separates_roles: bool = False

    def start(self, problem: StepProblem) -> DescentShard:
        """See `InnerSpec.start`."""
        return DescentShard(problem, self.perturbation)


class DescentInner:
    """The paper's inner loop: a fixed number of gradient-descent steps on the cubic model, redone for every M.

    The scalars of `descend` belong to the iterate before it, so one more call with a learning rate of 0 reads them at
    the final iterate: the predicted reduction is that of the very update that is tried. It costs no more than the
    paper's count, since the call at `Delta = 0` needs no product (see `InnerDescent.descend`): `num_steps` products
    per proposal.

    With `limits_rate` the learning rate is `min(eta, 1 / sqrt(M ||g||))`: the first iterate has length `eta ||g||` and
    the cubic term's curvature there is `M eta ||g||`, so a larger eta overshoots for that term alone, and a rejection,
    which raises M, would only make it worse. Where the loop does not decrease the model all the same, eta is above
    2 / (largest curvature of the objective); it is divided by 4 and the loop is run again, and eta stays there for the
    steps to come, whose curvature is much the same. Without `limits_rate` eta is the user's concern, as in the paper.
    """

    num_krylov_steps = 0

    def __init__(
        self,
        oracle: StepOracle,
        num_steps: int,
        learning_rate: float,
        perturbation: float,
        tolerance: float,
        limits_rate: bool,
    ) -> None:
        self._oracle = oracle
        self._num_steps, self._limits_rate, self._tolerance = num_steps, limits_rate, tolerance
        self.learning_rate = learning_rate
        """eta as it is now; the only thing that later steps remember."""
        self.spec = DescentSpec(perturbation)
        self.num_products = 0

    def begin(self, start: StepStart) -> None:
        """A new step."""
        self._gradient_norm = start.metric_gradient_norm
        self.num_products = 0

    def propose(self, cubic_coefficient: float) -> Proposal:
        """Run the inner loop from `Delta = 0`, again with a smaller rate while it does not descend."""
        proposal = self._run(cubic_coefficient)
        num_shrinks = _MAX_SHRINKS if self._limits_rate else 0
        while proposal.result in (Result.inner_not_descending, Result.nonfinite) and num_shrinks > 0:
            self.learning_rate = self._rate(cubic_coefficient) / 4.0
            num_shrinks -= 1
            proposal = self._run(cubic_coefficient)
        return proposal

    def _rate(self, cubic_coefficient: float) -> float:
        limit = 1.0 / math.sqrt(cubic_coefficient * self._gradient_norm)
        return min(self.learning_rate, limit) if self._limits_rate else self.learning_rate

    def _run(self, cubic_coefficient: float) -> Proposal:
        rate = self._rate(cubic_coefficient)
        self._oracle.advance()
        for _ in range(self._num_steps):
            self._oracle.advance(cubic_coefficient, rate)
        self.num_products += self._num_steps
        return self._judge(cubic_coefficient, InnerDescentEntry(*self._oracle.advance(cubic_coefficient, 0.0)))

    def _judge(self, cubic_coefficient: float, entry: InnerDescentEntry) -> Proposal:
        norm = entry.update_norm
        predicted = -(entry.gradient_dot + 0.5 * entry.curvature + cubic_coefficient / 6.0 * norm**3)
        if not (math.isfinite(predicted) and math.isfinite(entry.residual_norm)):
            return NO_PROPOSAL
        residual = entry.residual_norm / self._gradient_norm
        result = Result.successful if residual <= self._tolerance else Result.max_inner_steps
        if predicted <= 0.0:
            result = Result.inner_not_descending
        return Proposal(
            alpha=norm,
            gamma=0.5 * cubic_coefficient * norm,
            predicted_reduction=predicted,
            curvature=entry.curvature,
            residual=residual,
            result=result,
        )

    def attempt(self) -> Trial:
        """Apply the last iterate tentatively."""
        return self._oracle.candidate()
