"""AdamW and SGD through the same oracle and the same records, so that users can compare."""

import math
import time

from distributed_unlearn.records import StepRecord
from distributed_unlearn.solvers.inner.first_order import AdamWSpec, SgdSpec
from distributed_unlearn.solvers.methods.progress import Progress
from distributed_unlearn.solvers.protocols import StepOracle, StepSpec
from distributed_unlearn.solvers.solution import Result


class FirstOrder:
    """First-order steps; the moments live with the oracle."""

    def __init__(self, oracle: StepOracle, optimizer: AdamWSpec | SgdSpec, learning_rate: float) -> None:
        """Keep the oracle, the optimiser and the learning rate.

        Raises:
            ValueError: `learning_rate` is not positive.
        """
        if not learning_rate > 0.0:
            raise ValueError(f"got learning_rate {learning_rate}; expected a positive number")
        self._oracle, self._spec, self._learning_rate = oracle, StepSpec(optimizer), learning_rate

    def state_dict(self) -> dict[str, float]:
        """Empty: the oracle remembers the moments."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing to take over."""

    def step(self, step_index: int) -> StepRecord:
        """One optimiser step; fields that only second-order steps have are None, and no trial is measured.

        No step is taken on a loss or gradient that is not finite; such a step is recorded as not accepted, with result
        nonfinite.
        """
        started = time.perf_counter()
        progress = Progress(step_index, self._oracle.begin_step(step_index, self._spec), started)
        if not (math.isfinite(progress.start.loss) and math.isfinite(progress.start.gradient_norm)):
            return progress.record(Result.nonfinite, None)
        trial = self._oracle.candidate(self._learning_rate)
        self._oracle.accept()
        return progress.record(Result.successful, trial)
