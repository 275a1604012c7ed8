"""What a round needs of its workers, and the step oracle that reaches them with scalars only."""

from collections.abc import Sequence
from typing import Any, Protocol

from distributed_unlearn.solvers.protocols import InnerDescentEntry, KrylovEntry, StepStart, Trial


class WorkerGroup(Protocol):
    """N ranks that execute the same method together."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker with the same arguments; results in rank order.

        The first failure ends all workers and is raised.
        """
        ...

    def call_rank_zero(self, method: str, *arguments: Any) -> Any:
        """Call a method that is not collective on rank 0."""
        ...

    def share(self, value: Any) -> Any:
        """Put a large read-only value where every worker can reach it once; pass the result as an argument."""
        ...

    def shutdown(self) -> None:
        """End all workers."""
        ...


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
