"""A Ray of plain objects on a clock of its own: calls end when the test says, and nothing really waits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from distributed_unlearn.cluster.actor import Heartbeat

NEVER = float("inf")


@dataclass(eq=False)
class FakeRef:
    """A call that ends at a time with a value or an exception."""

    at: float
    outcome: Any = None


@dataclass(eq=False)
class FakeActor:
    """Answers heartbeats some time after they are asked."""

    ray: "FakeRay"
    delay: float = 0.0
    outcome: Any = field(default_factory=lambda: Heartbeat("open_model", 12.0))
    num_asked: int = 0

    @property
    def heartbeat(self) -> SimpleNamespace:
        return SimpleNamespace(remote=self._ask)

    def _ask(self) -> FakeRef:
        self.num_asked += 1
        return FakeRef(self.ray.now + self.delay, self.outcome)


class FakeRay:
    """`wait`, `get` and a clock; stands in for the modules `ray` and `time` alike."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[int] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, refs: Sequence[FakeRef], num_returns: int, timeout: float) -> tuple[list[FakeRef], list[FakeRef]]:
        self.waits.append(len(refs))
        times = sorted(ref.at for ref in refs)
        self.now = max(self.now, min(times[num_returns - 1], self.now + timeout))
        ready = [ref for ref in sorted(refs, key=lambda ref: ref.at) if ref.at <= self.now][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(gcs_address="10.0.0.1:6379")

    def get(self, ref: FakeRef) -> Any:
        assert ref.at <= self.now, "would block"
        if isinstance(ref.outcome, BaseException):
            raise ref.outcome
        return ref.outcome
