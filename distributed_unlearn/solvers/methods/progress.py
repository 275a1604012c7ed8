"""What a step has seen so far, and the record that it leaves."""

import math
import time
from dataclasses import dataclass, field

from distributed_unlearn.records import StepRecord
from distributed_unlearn.solvers.inner.proposal import Proposal
from distributed_unlearn.solvers.protocols import StepStart, Trial
from distributed_unlearn.solvers.solution import Result


@dataclass
class Progress:
    """One step, from its gradient to its record."""

    step: int
    start: StepStart
    started: float
    """`time.perf_counter()` before the gradient."""
    cubic_coefficient: float | None = None
    proposal: Proposal = field(default_factory=Proposal)
    actual: float | None = None
    ratio: float | None = None
    num_rejections: int = 0

    def blocked(self) -> Result | None:
        """Why no step can be taken from this start: nonfinite, zero_gradient, or None."""
        if not (math.isfinite(self.start.loss) and math.isfinite(self.start.gradient_norm)):
            return Result.nonfinite
        return Result.zero_gradient if self.start.gradient_norm == 0.0 else None

    def record(
        self, result: Result, kept: Trial | None, num_products: int = 0, num_krylov_steps: int = 0
    ) -> StepRecord:
        """The step as it ended; `kept` None means that the weights are as they were, and nothing was applied."""
        proposal = self.proposal
        return StepRecord(
            step=self.step,
            loss=self.start.loss,
            gradient_norm=self.start.gradient_norm,
            alpha=proposal.alpha,
            gamma=proposal.gamma,
            cubic_coefficient=self.cubic_coefficient,
            update_norm=None if kept is None else kept.update_norm,
            smallest_ritz_value=proposal.smallest_ritz_value,
            largest_ritz_value=proposal.largest_ritz_value,
            residual=proposal.residual,
            predicted_reduction=proposal.predicted_reduction,
            actual_reduction=self.actual,
            acceptance_ratio=self.ratio,
            accepted=kept is not None,
            num_rejections=self.num_rejections,
            num_krylov_steps=num_krylov_steps,
            num_products=num_products,
            result=result.name,
            wall_seconds=time.perf_counter() - self.started,
            terms=self.start.terms,
        )
