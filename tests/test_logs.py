"""Log lines as JSON with the rank, and what a run tells metrics and logs."""

import json
import logging
import sys
from collections.abc import Callable, Iterator

import pytest

from distributed_unlearn.commands.observed_events import ObservedEvents
from distributed_unlearn.errors import LedgerError
from distributed_unlearn.logs import PACKAGE, JsonLines, log_event, use_json_lines
from distributed_unlearn.records import StepRecord
from distributed_unlearn.rounds.events import Unwatched


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Reads what was written to stderr."""
    logger = logging.getLogger(PACKAGE)
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield lambda: capsys.readouterr().err
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def _read(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_has_the_rank_and_only_numbers_that_json_has(lines):
    logger = logging.getLogger(f"{PACKAGE}.engine.anything")
    use_json_lines(None)
    use_json_lines(3)
    log_event(logger, "step", alpha=0.5, gamma=float("nan"), accepted=True, outcome=None)
    try:
        raise ValueError("text of a record")
    except ValueError:
        logger.exception("%d of %d", 1, 2)
    text = lines()
    first, second = _read(text)
    assert (first["rank"], first["message"], first["event"], first["level"]) == (3, "step", "step", "info")
    assert (first["alpha"], first["gamma"], first["accepted"], first["outcome"]) == (0.5, None, True, None)
    assert str(first["time"]).endswith("+00:00") and first["logger"] == logger.name
    assert (second["message"], second["error"]) == ("1 of 2", "ValueError")
    assert "text of a record" not in text


def test_without_the_setting_nothing_is_written(lines):
    log_event(logging.getLogger(f"{PACKAGE}.x"), "step", alpha=0.5)
    assert lines() == ""
    assert not any(isinstance(h.formatter, JsonLines) for h in logging.getLogger(PACKAGE).handlers)


class _Metrics:
    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def step(self, seconds: float, num_products: int, values: dict[str, float | None]) -> None:
        self.told.append(("step", seconds, num_products, values))

    def phase(self, name: str, seconds: float) -> None:
        self.told.append(("phase", name, seconds >= 0))

    def queue(self, length: int, oldest_seconds: float | None) -> None:
        self.told.append(("queue", length, oldest_seconds))


STEP = StepRecord(
    *(0, 2.5, 1.0, 0.25, 1.25, 10.0, 0.1, None, None, 0.01, None, None, None),
    *(True, 0, 2, 7, "CONVERGED", 3.5),
)


def test_a_ledger_that_is_away_for_a_moment_ends_no_round():
    def away() -> tuple[int, float | None]:
        raise LedgerError("no answer", "a database", "start it")

    observed, metrics = ObservedEvents(Unwatched(), away), _Metrics()
    observed._found = metrics  # type: ignore[assignment]  # in the place of Ray's
    with observed.round(1, 2, 5) as tell:
        tell(STEP, {})
    assert [what for what, *_ in metrics.told] == ["step", "phase"]


def test_metrics_and_logs_are_told_what_the_console_is_told(lines):
    use_json_lines(None)
    seen: list[int] = []

    class Inner(Unwatched):
        def round(self, round_index: int, num_rounds: int, max_steps: int):
            from contextlib import nullcontext

            return nullcontext(lambda record, measured: seen.append(record.step))

    observed, metrics = ObservedEvents(Inner(), lambda: (3, 60.0)), _Metrics()
    observed._found = metrics  # type: ignore[assignment]  # in the place of Ray's
    with observed.stage("loading /a/path at ZeRO stage 3"):
        pass
    with observed.round(1, 2, 5) as tell:
        tell(STEP, {})
        tell(STEP, {})
    values = {"alpha": 0.25, "gamma": 1.25, "residual": 0.01, "loss": 2.5}
    step = ("step", 3.5, 7, values)
    assert metrics.told == [("phase", "loading", True), ("queue", 3, 60.0), step, step, ("phase", "round", True)]
    assert seen == [0, 0]
    text = lines()
    events = [(line["event"], line.get("phase"), line.get("step")) for line in _read(text)]
    assert events == [("phase", "loading", None), ("step", None, 1), ("step", None, 1), ("phase", "round", None)]
    assert "/a/path" not in text


def test_metrics_wait_for_whoever_opens_the_workers(monkeypatch: pytest.MonkeyPatch):
    """Importing Ray before its local cluster is secured would leave it open."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    observed = ObservedEvents(Unwatched())
    with observed.stage("loading"):
        pass
    assert "ray" not in sys.modules
