"""The command line on a local Ray: workers that die, signals, and who can reach it."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import Running, command_line, started, title
from tiny_job import TinyJob

pytestmark = [
    pytest.mark.slow,
    # The method "thread" would end this very process, before anything that it started.
    pytest.mark.timeout(1800, method="signal"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="fewer processors than workers"),
]

# From the kill to the end of the command. It is meant to take well under 60 s, and takes about 5 where a processor is
# free; but Ray's and Python's own way down is most of it, and takes many times that on a machine with other work.
END_SECONDS = 300


@pytest.fixture
def endless(tiny: TinyJob, tmp_path: Path) -> Iterator[Running]:
    """A job of 100,000 steps on two ZeRO-3 workers that has taken a few; its paths are relative."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model").symlink_to(tiny.model)
    overrides = ("model.path=./model", "cluster.backend=ray", "cluster.num_workers=2", "solver.max_steps=100000")
    with started(command_line(*tiny.run(Path("out"), *overrides)), tmp_path / "here") as running:
        running.wait_until(lambda: _num_steps(running) >= 3, 900)
        assert len(running.actors()) == 2
        yield running


def _num_steps(running: Running) -> int:
    path = running.folder / "out" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"round_1/step"' in line for line in lines)


def _assert_nothing_left(running: Running, logs_stay: bool = False) -> None:
    assert running.survivors(patience_seconds=60) == []
    left = {path.name for path in (running.folder / "out").iterdir()}
    assert left == {"metrics.jsonl", "tensorboard"}
    assert not (running.folder / ".ray").exists()  # no token file that others could read
    if not logs_stay:
        assert list(running.scratch.iterdir()) == []
    assert all(path.name == "logs" for path in running.scratch.glob("ray-*/session_2*/*"))
    lines = (running.folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["values"] for line in lines)


def test_a_killed_worker_ends_the_job(endless: Running):
    victim, family = endless.actors()[1], len(endless.family())
    victim.kill()
    assert endless.wait(END_SECONDS) == 8
    assert family >= 5  # driver, two actors, raylet, gcs: the watch sees what it should
    assert endless.err.count("error (worker): got worker ") == 1 and "which died during " in endless.err
    assert "every worker to finish the call" in endless.err and "can simply be run again" in endless.err
    assert f"pid: {victim.pid}" in endless.err  # Ray's own account of it
    assert "Traceback (most recent call last)" not in endless.err
    assert "Ray's own logs of this run stay in" in endless.err
    _assert_nothing_left(endless, logs_stay=True)


def test_a_head_that_is_gone_ends_the_job(endless: Running):
    """Ray's own way is to abort the driver after 60 s."""
    (head,) = (member for member in endless.family() if "gcs_server" in title(member))
    head.kill()
    before = time.monotonic()
    assert endless.wait(END_SECONDS) == 8
    assert time.monotonic() - before < 55
    assert endless.err.count("error (worker): got no connection to the head of the Ray cluster at 127.0.0.1:") == 1
    assert "Traceback" not in endless.err and "The program will terminate" not in endless.err
    _assert_nothing_left(endless, logs_stay=True)


def test_a_stopped_worker_is_named_within_a_minute(endless: Running):
    """Whatever the timeouts: here the defaults, of half an hour and more. It goes on where the worker does."""
    _, stopped = endless.actors()
    stopped.suspend()
    endless.wait_until(lambda: "has not answered for" in endless.err, 60)
    assert f"(process {stopped.pid} at 127.0.0.1) has not answered for" in endless.err
    assert endless.err.count("has not answered") == 1
    stopped.resume()
    endless.wait_until(lambda: "answers again" in endless.err, 60)
    steps = _num_steps(endless)
    endless.wait_until(lambda: _num_steps(endless) > steps, 120)


def test_nothing_outlives_a_killed_driver(endless: Running):
    """Neither workers nor Ray's agents, for which its own way takes more than a minute, nor its session folder."""
    endless.process.kill()
    endless.wait(30)
    assert endless.survivors(patience_seconds=20) == []
    assert list(endless.scratch.iterdir()) == []


def test_sigterm_ends_everything(endless: Running):
    """And, because starting takes long: while it runs, only this machine and only with a token can reach it."""
    _assert_loopback(endless)
    _assert_token(endless)
    endless.process.send_signal(signal.SIGTERM)
    assert endless.wait(END_SECONDS) == 143
    assert "Traceback" not in endless.err and "SIGTERM received" not in endless.err  # Ray's own handler aborts
    _assert_nothing_left(endless)


def _assert_loopback(running: Running) -> None:
    listening = {}
    for member in running.family():
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends its idle workers at any time
            for connection in member.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening[(member.name(), connection.laddr.port)] = connection.laddr.ip.removeprefix("::ffff:")
    names = " ".join(name for name, _ in listening)
    assert "gcs_server" in names and "raylet" in names and "RankActor" in names
    assert {place: ip for place, ip in listening.items() if ip != "127.0.0.1"} == {}


def _assert_token(running: Running) -> None:
    for actor in running.actors():
        variables = Path(f"/proc/{actor.pid}/environ").read_bytes().split(b"\0")
        assert b"RAY_AUTH_MODE=token" in variables
        tokens = [value for value in variables if value.startswith(b"RAY_AUTH_TOKEN=")]
        assert len(tokens) == 1 and len(tokens[0]) >= len(b"RAY_AUTH_TOKEN=") + 64
