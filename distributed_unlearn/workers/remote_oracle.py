"""The step oracle over a worker group: scalars only."""

from distributed_unlearn.solvers.protocols import StepSpec, StepStart, Trial
from distributed_unlearn.workers.group import WorkerGroup


class RemoteOracle:
    """`StepOracle` over a worker group: every call goes to all ranks, rank 0's floats come back."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

    def begin_step(self, step_index: int, spec: StepSpec) -> StepStart:
        """See `StepOracle.begin_step`."""
        start = self._call("begin_step", step_index, spec)
        assert isinstance(start, StepStart)
        return start

    def advance(self, *values: float) -> tuple[float, ...]:
        """See `StepOracle.advance`."""
        found = self._call("advance", *values)
        assert isinstance(found, tuple)
        return found

    def candidate(self, *values: float) -> Trial:
        """See `StepOracle.candidate`."""
        trial = self._call("candidate", *values)
        assert isinstance(trial, Trial)
        return trial

    def undo(self) -> None:
        """See `StepOracle.undo`."""
        self._call("undo")

    def accept(self) -> None:
        """See `StepOracle.accept`."""
        self._call("accept")

    def _call(self, method: str, *arguments: object) -> object:
        return self._group.call_all("oracle_call", method, *arguments)[0]
