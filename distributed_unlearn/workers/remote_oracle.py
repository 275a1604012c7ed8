"""The step oracle over a worker group: scalars only."""

from collections.abc import Sequence
from typing import Any

from distributed_unlearn.solvers.protocols import InnerDescentEntry, KrylovEntry, StepStart, Trial
from distributed_unlearn.workers.group import WorkerGroup


class RemoteOracle:
    """`StepOracle` over a worker group: every call goes to all ranks, rank 0's floats come back."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._group.call_all("oracle_call", method, *arguments)[0]

    def begin_step(self, step_index: int) -> StepStart:
        """See `StepOracle.begin_step`."""
        return self._call("begin_step", step_index)

    def extend_krylov(self) -> KrylovEntry:
        """See `StepOracle.extend_krylov`."""
        return self._call("extend_krylov")

    def try_krylov(self, coefficients: Sequence[float]) -> Trial:
        """See `StepOracle.try_krylov`."""
        return self._call("try_krylov", tuple(coefficients))

    def begin_descent(self, perturbation: float) -> None:
        """See `StepOracle.begin_descent`."""
        self._call("begin_descent", perturbation)

    def descend(self, cubic_coefficient: float, learning_rate: float) -> InnerDescentEntry:
        """See `StepOracle.descend`."""
        return self._call("descend", cubic_coefficient, learning_rate)

    def try_descent(self) -> Trial:
        """See `StepOracle.try_descent`."""
        return self._call("try_descent")

    def undo(self) -> None:
        """See `StepOracle.undo`."""
        self._call("undo")

    def accept(self) -> None:
        """See `StepOracle.accept`."""
        self._call("accept")

    def first_order_step(self, step_index: int, learning_rate: float) -> StepStart:
        """See `StepOracle.first_order_step`."""
        return self._call("first_order_step", step_index, learning_rate)
