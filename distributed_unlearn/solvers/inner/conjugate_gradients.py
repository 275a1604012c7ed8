"""`(H + gamma I) Delta = -g` by conjugate gradients: the damped Newton step without a matrix.

Hestenes and Stiefel 1952. The iteration solves the linear system and nothing else: where `H + gamma I` is not positive
definite it goes on (as the Newton step of the literature does) and says so. It keeps four vectors.
"""

import math
from dataclasses import dataclass

import torch

from distributed_unlearn.solvers.inner.proposal import NO_PROPOSAL, Proposal
from distributed_unlearn.solvers.problem import StepProblem
from distributed_unlearn.solvers.protocols import StepOracle, StepStart, Trial
from distributed_unlearn.solvers.solution import Result


class ConjugateGradientsShard:
    """`advance(gamma)` is one iteration (one exact product) from `Delta = 0`; `candidate()` is the iterate."""

    def __init__(self, problem: StepProblem) -> None:
        self._problem = problem
        self._update = torch.zeros_like(problem.gradient)
        self._residual = -problem.gradient  # -g - (H + gamma I) Delta
        self._direction = self._residual.clone()
        self._squared: float | None = None

    def advance(self, *values: float) -> tuple[float, ...]:
        """`p'(H + gamma I)p / ||p||^2`, `||r||`, `<g, Delta>`, `<Delta, H Delta>`, `||Delta||` after the iteration.

        Nothing moves where the first of them is exactly zero or not finite. Three reductions. All ranks must call this.
        """
        (damping,) = values
        space, p = self._problem.space, self._direction
        if self._squared is None:
            self._squared = space.dots([self._residual], self._residual)[0]
        product = self._problem.product(p)
        curvature, length = space.dots([product, p], p)
        curvature += damping * length
        if curvature != 0.0 and math.isfinite(curvature):
            factor = self._squared / curvature
            self._update.add_(p, alpha=factor)
            self._residual.sub_(product, alpha=factor).sub_(p, alpha=factor * damping)
            squared = space.dots([self._residual], self._residual)[0]
            self._direction = torch.add(self._residual, p, alpha=squared / self._squared)
            self._squared = squared
        slope, of_residual, norm = space.dots([self._problem.gradient, self._residual, self._update], self._update)
        # H Delta = -g - r - gamma Delta
        model = -slope - of_residual - damping * norm
        return curvature / length, math.sqrt(self._squared), slope, model, math.sqrt(norm)

    def candidate(self, *values: float) -> torch.Tensor:
        """The current iterate."""
        return self._update

    def accept(self) -> None:
        """Nothing is remembered."""


@dataclass(frozen=True)
class ConjugateGradientsSpec:
    """Conjugate gradients from zero."""

    measures_trials: bool = True
    separates_roles: bool = False

    def start(self, problem: StepProblem) -> ConjugateGradientsShard:
        """See `InnerSpec.start`."""
        return ConjugateGradientsShard(problem)


class ConjugateGradientsInner:
    """Iterates until `||r|| <= tolerance ||g||` or for `max_steps` products, whatever the signs of the curvature."""

    num_krylov_steps = 0

    def __init__(self, oracle: StepOracle, damping: float, max_steps: int, tolerance: float) -> None:
        self._oracle, self._damping = oracle, damping
        self._max_steps, self._tolerance = max_steps, tolerance
        self.spec = ConjugateGradientsSpec()
        self.num_products = 0

    def begin(self, start: StepStart) -> None:
        """A new step."""
        self._gradient_norm = start.metric_gradient_norm
        self.num_products = 0

    def propose(self) -> Proposal:
        """The damped Newton step; `predicted_reduction` is that of the undamped quadratic model, of either sign.

        The result is negative_curvature where a direction had `p'(H + gamma I)p <= 0` (the system is not positive
        definite, and its solution no minimiser), else max_cg_steps where the residual is above the tolerance.
        """
        indefinite, residual = False, 1.0
        while residual > self._tolerance and self.num_products < self._max_steps:
            curvature, residual_norm, slope, model, norm = self._oracle.advance(self._damping)
            self.num_products += 1
            if not all(math.isfinite(value) for value in (curvature, residual_norm, slope, model, norm)):
                return NO_PROPOSAL
            residual = residual_norm / self._gradient_norm
            indefinite = indefinite or curvature <= 0.0
            if curvature == 0.0:
                break
        result = Result.successful if residual <= self._tolerance else Result.max_cg_steps
        return Proposal(
            gamma=self._damping,
            predicted_reduction=-(slope + 0.5 * model),
            curvature=model,
            residual=residual,
            result=Result.negative_curvature if indefinite else result,
        )

    def attempt(self) -> Trial:
        """Apply the iterate tentatively."""
        return self._oracle.candidate()
