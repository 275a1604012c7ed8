"""SCureNewton: stochastic cubic-regularised Newton steps, driven by scalars.

Bui et al., arXiv 2406.14507; acceptance as in adaptive cubic regularisation (Cartis, Gould, Toint 2011, algorithm
2.1). We differ from the paper in the default inner solver (Krylov), in adapting M, and in that every trial is
measured before it is kept.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

from distributed_unlearn.records import StepRecord
from distributed_unlearn.solvers.adaptation import Adaptation, estimate_coefficient
from distributed_unlearn.solvers.inner.proposal import DescentInner, InnerSolver, KrylovInner, Proposal
from distributed_unlearn.solvers.protocols import StepOracle, StepStart, Trial
from distributed_unlearn.solvers.solution import Result

_LOSS_RESOLUTION = 10 * 1.1920929e-07  # ten float32 epsilons: what a float32 loss can resolve, relative to itself
_NO_PROPOSAL = (Result.nonfinite, Result.inner_not_descending)


@dataclass(frozen=True)
class SCureNewtonSettings:
    """How a step is taken; field for field the second-order part of `config.SolverConfig`, plus `adaptation`."""

    inner: Literal["krylov", "gradient_descent"] = "krylov"
    max_krylov_steps: int = 3
    krylov_tolerance: float = 1e-2
    """Largest model residual over `||g||` that counts as solved; also judges gradient_descent's last iterate."""
    inner_steps: int = 10
    inner_learning_rate: float = 0.01
    perturbation: float = 1e-3
    cubic_coefficient: float = 100.0
    """M of the first step when `adaptive`, of every step when not."""
    adaptive: bool = True
    adaptation: Literal["factor", "interpolated"] = "interpolated"
    acceptance_threshold: float = 0.1
    very_good_threshold: float = 0.7
    increase_factor: float = 4.0
    decrease_factor: float = 3.0
    max_rejections: int = 8

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: the names of all fields out of range.
        """
        wrong = [
            name
            for name, right in {
                "max_krylov_steps": self.max_krylov_steps >= 1,
                "krylov_tolerance": self.krylov_tolerance >= 0.0,
                "inner_steps": self.inner_steps >= 1,
                "inner_learning_rate": self.inner_learning_rate > 0.0,
                "perturbation": self.perturbation >= 0.0,
                "cubic_coefficient": 0.0 < self.cubic_coefficient < math.inf,
                "acceptance_threshold": 0.0 < self.acceptance_threshold < 1.0,
                "very_good_threshold": self.acceptance_threshold <= self.very_good_threshold <= 1.0,
                "increase_factor": self.increase_factor > 1.0,
                "decrease_factor": self.decrease_factor >= 1.0,
                "max_rejections": self.max_rejections >= 0,
            }.items()
            if not right
        ]
        if wrong:
            raise ValueError(f"got {', '.join(f'{name}={getattr(self, name)}' for name in wrong)}: out of range")


@dataclass
class _Progress:
    """What one step has seen so far."""

    step: int
    started: float
    start: StepStart
    cubic_coefficient: float
    proposal: Proposal | None = None
    inner: InnerSolver | None = None
    actual: float | None = None
    ratio: float | None = None
    num_rejections: int = 0

    def record(self, result: Result, update_norm: float | None) -> StepRecord:
        """The step as it ended; `update_norm` None means that the weights are as they were."""
        proposal = self.proposal or Proposal(None, None, None, None, None, None, result)
        return StepRecord(
            step=self.step,
            loss=self.start.loss,
            gradient_norm=self.start.gradient_norm,
            alpha=proposal.alpha,
            gamma=proposal.gamma,
            cubic_coefficient=self.cubic_coefficient,
            update_norm=update_norm or 0.0,
            smallest_ritz_value=proposal.smallest_ritz_value,
            largest_ritz_value=proposal.largest_ritz_value,
            residual=proposal.residual,
            predicted_reduction=proposal.predicted_reduction,
            actual_reduction=self.actual,
            acceptance_ratio=self.ratio,
            accepted=update_norm is not None,
            num_rejections=self.num_rejections,
            num_krylov_steps=self.inner.num_krylov_steps if self.inner else 0,
            num_products=self.inner.num_products if self.inner else 0,
            result=result.name,
            wall_seconds=time.perf_counter() - self.started,
            terms=self.start.terms,
        )


class SCureNewton:
    """Takes steps on an oracle; the only state between steps is the cubic coefficient."""

    def __init__(self, oracle: StepOracle, settings: SCureNewtonSettings) -> None:
        """Start with `settings.cubic_coefficient`."""
        self._oracle, self._settings = oracle, settings
        self._coefficient = settings.cubic_coefficient
        self._adaptation = Adaptation(
            settings.adaptation, settings.increase_factor, settings.decrease_factor, settings.very_good_threshold
        )

    @property
    def cubic_coefficient(self) -> float:
        """M with which the next step begins."""
        return self._coefficient

    def step(self, step_index: int) -> StepRecord:
        """One step: gradient, inner solve, trial, and accept or undo until one is good or the rejections run out.

        Rejections on a Krylov space cost a forward pass each and no product. A trial loss that is not finite is a
        rejection, whatever the settings; without `adaptive` there is no second trial. A step that does not change the
        weights says why in `result`.
        """
        started = time.perf_counter()
        start = self._oracle.begin_step(step_index)
        progress = _Progress(step_index, started, start, self._coefficient)
        if not (math.isfinite(start.loss) and math.isfinite(start.gradient_norm)):
            return progress.record(Result.nonfinite, None)
        if start.gradient_norm == 0.0:
            return progress.record(Result.zero_gradient, None)
        progress.inner = self._new_inner(start.gradient_norm)
        first_coefficient = self._coefficient
        while True:
            progress.cubic_coefficient = self._coefficient
            proposal = progress.proposal = progress.inner.propose(self._coefficient)
            progress.actual = progress.ratio = None
            gives_up = _NO_PROPOSAL if self._settings.adaptive else (Result.nonfinite,)
            if proposal.result in gives_up:
                return progress.record(proposal.result, None)
            trial = progress.inner.attempt()
            if self._is_good(progress, trial):
                self._oracle.accept()
                return progress.record(proposal.result, trial.update_norm)
            self._oracle.undo()
            progress.num_rejections += 1
            finite = math.isfinite(trial.loss)
            if not self._settings.adaptive or progress.num_rejections > self._settings.max_rejections:
                self._coefficient = self._adaptation.after_giving_up(first_coefficient, self._coefficient)
                return progress.record(Result.rejected if finite else Result.nonfinite, None)

    def _new_inner(self, gradient_norm: float) -> InnerSolver:
        settings = self._settings
        if settings.inner == "krylov":
            return KrylovInner(self._oracle, gradient_norm, settings.max_krylov_steps, settings.krylov_tolerance)
        return DescentInner(
            self._oracle,
            gradient_norm,
            settings.inner_steps,
            settings.inner_learning_rate,
            settings.perturbation,
            settings.krylov_tolerance,
            limits_rate=settings.adaptive,
        )

    def _is_good(self, progress: _Progress, trial: Trial) -> bool:
        """Whether to keep the trial; sets the ratio and, when adaptive, the next coefficient either way."""
        assert progress.proposal is not None and progress.proposal.predicted_reduction is not None
        predicted = progress.proposal.predicted_reduction
        actual = progress.start.loss - trial.loss
        finite = math.isfinite(trial.loss)
        allowance = _LOSS_RESOLUTION * abs(progress.start.loss)
        if finite:
            # Near a stationary point both reductions drown in the rounding of the loss; the allowance then makes the
            # ratio 1 (Conn, Gould, Toint 2000, section 17.4.2).
            progress.actual = actual
            progress.ratio = (actual + allowance) / (predicted + allowance) if predicted + allowance > 0.0 else 0.0
        if not self._settings.adaptive:
            return finite
        estimate = estimate_coefficient(self._coefficient, predicted, actual, trial.update_norm, allowance)
        if progress.ratio is not None and progress.ratio >= self._settings.acceptance_threshold:
            self._coefficient = self._adaptation.after_acceptance(self._coefficient, estimate, progress.ratio)
            return True
        self._coefficient = self._adaptation.after_rejection(self._coefficient, estimate)
        return False
