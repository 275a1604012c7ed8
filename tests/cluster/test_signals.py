"""Signals end a run in order and say so, whichever comes and however often."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Running, command_line, heed_signals, started
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


LATE = """
import os, signal, sys
from distributed_unlearn import cli

class Late:  # dies while modules are torn down, after Python has put its default handlers back
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.{second}):
        kill(process, number)

late = Late()
cli._dispatch = lambda *_: os.kill(os.getpid(), signal.{first})
sys.exit(cli.main(["check", "curvature", "--model", "none"]))
"""


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [("SIGINT", "SIGINT", 130), ("SIGHUP", "SIGTERM", 129), ("SIGTERM", "SIGHUP", 143)],
)
def test_a_second_signal_while_python_shuts_down_changes_nothing(first, second, code):
    ended = subprocess.run(
        [sys.executable, "-c", LATE.format(first=first, second=second)],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=heed_signals,
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.count("nothing was left half-written") == 1
