"""The outer loop of the cubic methods: trial, accept or undo, M; acceptance as in adaptive cubic regularisation.

Cartis, Gould, Toint 2011, algorithm 2.1. Without `adaptive` it is the paper's (Bui et al., arXiv 2406.14507): M fixed
and every step kept.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

from distributed_unlearn.records import StepRecord
from distributed_unlearn.solvers.adaptation import Adaptation, estimate_coefficient, model_error
from distributed_unlearn.solvers.inner.proposal import InnerSolver
from distributed_unlearn.solvers.methods.progress import Progress
from distributed_unlearn.solvers.metric import AdamMetric
from distributed_unlearn.solvers.protocols import StepOracle, StepSpec, Trial
from distributed_unlearn.solvers.solution import Result

_LOSS_RESOLUTION = 10 * 1.1920929e-07  # ten float32 epsilons: what a float32 loss can resolve, relative to itself
_NO_PROPOSAL = (Result.nonfinite, Result.inner_not_descending)


@dataclass(frozen=True)
class CubicSettings:
    """How a cubic step is judged, and how M moves; field for field a part of the job file's solver section."""

    cubic_coefficient: float = 100.0
    """M of the first trial when `adaptive`, of every step when not."""
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


class CubicNewton:
    """Takes steps on an oracle; between steps it remembers the cubic coefficient and whether a trial was measured."""

    def __init__(
        self, oracle: StepOracle, inner: InnerSolver, settings: CubicSettings, metric: AdamMetric | None = None
    ) -> None:
        """Start with `settings.cubic_coefficient`."""
        self._oracle, self._inner, self._settings = oracle, inner, settings
        self._coefficient = settings.cubic_coefficient
        self._has_measured = False
        self._interpolates = settings.adaptive and settings.adaptation == "interpolated"
        # The `factor` rule also asks whether a step was very good, and a sample seldom says that clearly.
        self._spec = StepSpec(
            inner.spec, metric, measures_remainder=self._interpolates, samples_trials=self._interpolates
        )
        self._adaptation = Adaptation(
            settings.adaptation, settings.increase_factor, settings.decrease_factor, settings.very_good_threshold
        )

    @property
    def cubic_coefficient(self) -> float:
        """M with which the next step begins."""
        return self._coefficient

    def state_dict(self) -> dict[str, float]:
        """What the next step needs of the ones before it, beside what the oracle remembers."""
        return {"cubic_coefficient": self._coefficient, "has_measured": float(self._has_measured)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from another one's `state_dict`."""
        self._coefficient, self._has_measured = state["cubic_coefficient"], bool(state["has_measured"])

    def step(self, step_index: int) -> StepRecord:
        """One step: gradient, inner solve, trial, and accept or undo until one is good or the rejections run out.

        Rejections on a Krylov space, a subspace or an explicit Hessian cost a forward pass each and no product. A
        trial loss that is not finite is a rejection, whatever the settings; without `adaptive` there is no second
        trial. A step that does not change the weights says why in `result`.
        """
        started = time.perf_counter()
        progress = Progress(step_index, self._oracle.begin_step(step_index, self._spec), started, self._coefficient)
        blocked = progress.blocked()
        if blocked is not None:
            self._oracle.abandon()
            return progress.record(blocked, None)
        self._inner.begin(progress.start)
        first_coefficient = self._coefficient
        gives_up = _NO_PROPOSAL if self._settings.adaptive else (Result.nonfinite,)
        while True:
            progress.cubic_coefficient = self._coefficient
            proposal = progress.proposal = self._inner.propose(self._coefficient)
            progress.actual = progress.ratio = None
            if proposal.result in gives_up:
                return self._give_up(progress, proposal.result, first_coefficient)
            trial = self._inner.attempt()
            if not self._is_clear(progress, trial):
                trial = self._oracle.measure_whole()
            if self._is_good(progress, trial):
                self._oracle.accept()
                return self._record(progress, proposal.result, trial)
            self._oracle.undo()
            progress.num_rejections += 1
            if not self._settings.adaptive or progress.num_rejections > self._settings.max_rejections:
                finite = trial.loss is not None and math.isfinite(trial.loss)
                return self._give_up(progress, Result.rejected if finite else Result.nonfinite, first_coefficient)

    def _give_up(self, progress: Progress, result: Result, first_coefficient: float) -> StepRecord:
        """The step ends without an update, and what was held for it is let go."""
        self._coefficient = self._adaptation.after_giving_up(first_coefficient, self._coefficient)
        self._oracle.abandon()
        return self._record(progress, result, None)

    def _record(self, progress: Progress, result: Result, kept: Trial | None) -> StepRecord:
        return progress.record(result, kept, self._inner.num_products, self._inner.num_krylov_steps)

    def _is_clear(self, progress: Progress, trial: Trial) -> bool:
        """Whether a trial on a sample need not be measured on the whole minibatch: it is good at its error's worst.

        Only an acceptance is decided by a sample. The update depends on the sample through its curvature, which
        makes the sample a little too kind; the bound, one-sided at 95 %, is far wider than that.
        """
        predicted = progress.proposal.predicted_reduction
        assert predicted is not None and trial.loss is not None
        if trial.loss_error == 0.0 or not math.isfinite(trial.loss):
            return True
        allowance = _LOSS_RESOLUTION * abs(progress.start.loss)
        least = progress.start.loss - trial.loss - trial.loss_error
        return least + allowance >= self._settings.acceptance_threshold * (predicted + allowance)

    def _is_good(self, progress: Progress, trial: Trial) -> bool:
        """Whether to keep the trial; sets the ratio and, when adaptive, the next coefficient either way."""
        predicted = progress.proposal.predicted_reduction
        assert predicted is not None and trial.loss is not None
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
        estimate = estimate_coefficient(self._coefficient, predicted, actual, trial.metric_norm, allowance)
        if progress.ratio is None or progress.ratio < self._settings.acceptance_threshold:
            # The retry must pass the same test: what separates the minibatches counts here.
            self._coefficient = self._adaptation.after_rejection(self._coefficient, estimate)
            return False
        if trial.remainder is not None:
            assert progress.proposal.curvature is not None
            estimate = model_error(trial.remainder, progress.proposal.curvature, trial.metric_norm, allowance)
        elif estimate is not None:
            estimate = abs(estimate)
        moves = self._adaptation.after_first_trial if self._is_first() else self._adaptation.after_acceptance
        self._coefficient = moves(self._coefficient, estimate, progress.ratio)
        return True

    def _is_first(self) -> bool:
        """True once: for the first trial that is kept, and whose error says how large M is at all."""
        first, self._has_measured = not self._has_measured, True
        return first and self._interpolates
