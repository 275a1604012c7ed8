"""What a run tells, also as metrics and as log lines with fields; whoever watches it is told everything first."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING

from distributed_unlearn.config import JobConfig
from distributed_unlearn.data.prepare import PreparedData
from distributed_unlearn.errors import LedgerError
from distributed_unlearn.logs import log_event
from distributed_unlearn.records import RoundRecord, StepRecord
from distributed_unlearn.rounds.events import OnStep, OnTrainingStep, RunEvents
from distributed_unlearn.workers.messages import ModelFacts

if TYPE_CHECKING:
    from distributed_unlearn.cluster.metrics import Metrics

QUEUE_SECONDS = 30.0
"""How old the length of the queue may be that is exported during a round."""
_LOG = logging.getLogger(__name__)
Queue = Callable[[], tuple[int, float | None]]
"""Requests without an answer, and the age of the oldest in seconds."""


class ObservedEvents:
    """`RunEvents` in front of others."""

    def __init__(self, inner: RunEvents, queue: Queue | None = None) -> None:
        self._inner, self._queue, self._queue_told = inner, queue, float("-inf")
        self._found: Metrics | None = None

    def _metrics(self) -> "Metrics | None":
        """None until Ray was imported by whoever opened the workers: importing it here would leave it unprotected."""
        if self._found is None and "ray" in sys.modules:
            from distributed_unlearn.cluster.metrics import Metrics

            self._found = Metrics()
        return self._found

    def prepared(self, job: JobConfig, data: PreparedData) -> None:
        """Counts of the partition."""
        self._inner.prepared(job, data)
        partition = data.partition
        sizes = {"num_training": len(partition.training), "num_holdout": len(partition.holdout)}
        log_event(_LOG, "prepared", num_forget=sum(map(len, partition.forget_rounds)), **sizes)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Its seconds; the first word of its text names the phase."""
        with self._phase(text.split()[0]), self._inner.stage(text):
            yield

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            log_event(_LOG, "phase", phase=name, seconds=seconds)
            metrics = self._metrics()
            if metrics is not None:
                metrics.phase(name, seconds)

    def note(self, text: str) -> None:
        """Handed on."""
        self._inner.note(text)

    def opened(self, facts: ModelFacts) -> None:
        """Handed on."""
        self._inner.opened(facts)

    @contextmanager
    def round(self, round_index: int, num_rounds: int, max_steps: int) -> Iterator[OnStep]:
        """Every step."""
        with self._phase("round"), self._inner.round(round_index, num_rounds, max_steps) as tell:

            def on_step(record: StepRecord, measured: Mapping[str, float]) -> None:
                tell(record, measured)
                self._step(round_index, record)

            self._tell_queue()
            yield on_step

    def _step(self, round_index: int, record: StepRecord) -> None:
        values = {name: getattr(record, name) for name in ("alpha", "gamma", "residual", "loss")}
        counts = {"num_products": record.num_products, "accepted": record.accepted, "seconds": record.wall_seconds}
        log_event(_LOG, "step", round=round_index + 1, step=record.step + 1, **values, **counts)
        metrics = self._metrics()
        if metrics is not None:
            metrics.step(record.wall_seconds, record.num_products, values)
        self._tell_queue()

    def _tell_queue(self) -> None:
        metrics, now = self._metrics(), time.monotonic()
        if metrics is not None and self._queue is not None and now - self._queue_told >= QUEUE_SECONDS:
            self._queue_told = now
            with suppress(LedgerError):  # it may come back; a gauge must not end a round
                metrics.queue(*self._queue())

    def round_ended(self, record: RoundRecord) -> None:
        """How it ended, in numbers."""
        self._inner.round_ended(record)
        outcome = None if record.verdict.forget is None else record.verdict.forget.outcome
        counts = {"num_steps": record.num_steps, "num_products": record.num_products, "seconds": record.wall_seconds}
        log_event(_LOG, "round_ended", round=record.round_index + 1, outcome=outcome, **counts)

    @contextmanager
    def training(self, num_steps: int) -> Iterator[OnTrainingStep]:
        """Its seconds."""
        inner: AbstractContextManager[OnTrainingStep] = self._inner.training(num_steps)
        with self._phase("training"), inner as tell:
            yield tell
