"""Signals end a run in order and say so, whichever comes and however often."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Running, command_line, started
from tiny_job import TinyJob

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200, method="signal")]


@pytest.fixture
def endless(tiny: TinyJob, tmp_path: Path) -> Iterator[Running]:
    """A job of 100,000 steps in one process that has taken a few."""
    (tmp_path / "here").mkdir()
    with started(command_line(*tiny.run(Path("out"), "solver.max_steps=100000")), tmp_path / "here") as running:
        metrics = running.folder / "out" / "metrics.jsonl"
        running.wait_until(lambda: metrics.exists() and metrics.read_text().count("/step") >= 3, 600)
        yield running


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        ((signal.SIGINT, signal.SIGINT), 130, "interrupted; nothing was left half-written"),
        ((signal.SIGTERM,), 143, "terminated; nothing was left half-written"),
        ((signal.SIGHUP, signal.SIGTERM), 129, "terminated; nothing was left half-written"),
    ],
    ids=["two SIGINT", "SIGTERM", "SIGHUP and SIGTERM"],
)
def test_a_signal_ends_the_run_in_order(sent, code, said, endless: Running):
    for number in sent:
        endless.process.send_signal(number)
        time.sleep(0.3)
    assert endless.wait(300) == code, endless.err
    assert endless.err.count(said) == 1 and "Traceback" not in endless.err
    assert {path.name for path in (endless.folder / "out").iterdir()} == {"metrics.jsonl", "tensorboard"}
    assert endless.survivors(patience_seconds=60) == []
