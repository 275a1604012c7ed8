"""Plain Newton steps for comparison: a direction, no test, no step control; what happens is recorded."""

import math
import time
from typing import Protocol

from distributed_unlearn.records import StepRecord
from distributed_unlearn.solvers.inner.proposal import Proposal
from distributed_unlearn.solvers.methods.progress import Progress
from distributed_unlearn.solvers.protocols import InnerSpec, StepOracle, StepSpec, StepStart, Trial
from distributed_unlearn.solvers.solution import Result


class NewtonInner(Protocol):
    """The driver's half of an inner solver of `H Delta = -g`; `begin` is called once a step."""

    @property
    def num_products(self) -> int:
        """Of the current step."""
        ...

    @property
    def spec(self) -> InnerSpec:
        """What the shards need to take part."""
        ...

    def begin(self, start: StepStart) -> None:
        """A new step on the oracle, whose gradient is finite and not zero."""
        ...

    def propose(self) -> Proposal:
        """Solve the system."""
        ...

    def attempt(self) -> Trial:
        """Apply the proposal tentatively."""
        ...


class NewtonStep:
    """`w + Delta` whatever the objective says of it, as in the paper; only a loss that is not finite is undone.

    Nothing is remembered between steps.
    """

    def __init__(self, oracle: StepOracle, inner: NewtonInner) -> None:
        self._oracle, self._inner = oracle, inner
        self._spec = StepSpec(inner.spec)

    def state_dict(self) -> dict[str, float]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing to take over."""

    def step(self, step_index: int) -> StepRecord:
        """One step; `actual_reduction` of an exploding step is as negative as it was, and `update_norm` as large."""
        started = time.perf_counter()
        progress = Progress(step_index, self._oracle.begin_step(step_index, self._spec), started)
        blocked = progress.blocked()
        if blocked is not None:
            self._oracle.abandon()
            return progress.record(blocked, None)
        self._inner.begin(progress.start)
        proposal = progress.proposal = self._inner.propose()
        if proposal.result is Result.nonfinite:
            self._oracle.abandon()
            return progress.record(Result.nonfinite, None, self._inner.num_products)
        trial = self._inner.attempt()
        assert trial.loss is not None
        if not (math.isfinite(trial.loss) and math.isfinite(trial.update_norm)):
            self._oracle.undo()
            self._oracle.abandon()
            progress.num_rejections = 1
            return progress.record(Result.nonfinite, None, self._inner.num_products)
        progress.actual = progress.start.loss - trial.loss
        self._oracle.accept()
        return progress.record(proposal.result, trial, self._inner.num_products)
