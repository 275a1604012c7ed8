"""AdamW and SGD through the same oracle and the same records, so that users can compare."""

import math
import time

from distributed_unlearn.records import StepRecord
from distributed_unlearn.solvers.protocols import StepOracle
from distributed_unlearn.solvers.solution import Result


class FirstOrder:
    """First-order steps; the optimiser and its state live with the oracle."""

    def __init__(self, oracle: StepOracle, learning_rate: float) -> None:
        """Keep the oracle and the learning rate.

        Raises:
            ValueError: `learning_rate` is not positive.
        """
        if not learning_rate > 0.0:
            raise ValueError(f"got learning_rate {learning_rate}; expected a positive number")
        self._oracle, self._learning_rate = oracle, learning_rate

    def step(self, step_index: int) -> StepRecord:
        """One optimiser step; fields that only second-order steps have are None and the update norm is not measured.

        The oracle takes no step on a loss or gradient that is not finite; such a step is recorded as not accepted,
        with result nonfinite.
        """
        started = time.perf_counter()
        start = self._oracle.first_order_step(step_index, self._learning_rate)
        finite = math.isfinite(start.loss) and math.isfinite(start.gradient_norm)
        return StepRecord(
            step=step_index,
            loss=start.loss,
            gradient_norm=start.gradient_norm,
            alpha=None,
            gamma=None,
            cubic_coefficient=None,
            update_norm=0.0,
            smallest_ritz_value=None,
            largest_ritz_value=None,
            residual=None,
            predicted_reduction=None,
            actual_reduction=None,
            acceptance_ratio=None,
            accepted=finite,
            num_rejections=0,
            num_krylov_steps=0,
            num_products=0,
            result=(Result.successful if finite else Result.nonfinite).name,
            wall_seconds=time.perf_counter() - started,
            terms=start.terms,
        )
