"""What a local Ray leaves: ended and removed with its driver, however that ends; without Ray's processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distributed_unlearn.cluster import reaper
from distributed_unlearn.cluster.local_ray import private_folder
from distributed_unlearn.errors import ResourceError, WorkerError

# Stands for a driver: what it starts leads a session of its own, as Ray's processes do. One child has no mark in its
# environment and an ancestor that has; another has neither, as Ray's agents, and its log open.
DRIVER = """
import os, subprocess, sys, time
from distributed_unlearn.cluster.local_ray import private_folder
with private_folder() as folder:
    (folder / "session_1" / "logs").mkdir(parents=True)
    (folder / "session_1" / "logs" / "raylet.out").write_text("a log")
    (folder / "session_latest").symlink_to(folder / "session_1")
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'], env={})"
    subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.DEVNULL)
    agent = child.replace(".run([sys.executable", ".Popen(executable=sys.executable, args=['ray::Agent'")
    with open(folder / "session_1" / "logs" / "agent.log", "w") as log:
        subprocess.run([sys.executable, "-c", agent], start_new_session=True, stdout=log)
    print(folder, flush=True)
    time.sleep(600)
"""


def _gone(folder: Path, driver: int, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while (folder.exists() or reaper.marked(str(folder), driver)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not folder.exists() and not reaper.marked(str(folder), driver)


def test_a_killed_driver_leaves_nothing(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_TMPDIR": str(tmp_path)},
    ) as driver:
        assert driver.stdout is not None
        folder = Path(driver.stdout.readline().strip())
        try:
            assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
            deadline = time.monotonic() + 60
            while len(family := reaper.marked(str(folder), driver.pid)) < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(family) == 3 and driver.pid not in family and os.getpid() not in family
        finally:
            driver.kill()
        assert _gone(folder, driver.pid)
        assert not any(map(_runs, family))


def _runs(process: int) -> bool:
    """Whether it does, dead ones that nobody waited for aside."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _with_a_log(folder: Path) -> Path:
    log = folder / "session_1" / "logs" / "raylet.out"
    log.parent.mkdir(parents=True)
    log.write_text("a log")
    (folder / "session_1" / "sockets").mkdir()
    (folder / "session_1" / "ports.json").write_text("{}")
    (folder / "session_latest").symlink_to(folder / "session_1")
    return log


def test_after_the_block_nothing_is_left(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "not" / "there"))
    with private_folder() as folder:
        held = _with_a_log(folder).open()  # as Ray does in its driver, for good
        assert os.environ[reaper.MARK] == str(folder)
    held.close()
    assert not folder.exists() and reaper.MARK not in os.environ and caplog.messages == []


@pytest.mark.parametrize("error", [WorkerError("a", "b", "c"), ResourceError("a", "b", "c")], ids=lambda e: e.kind)
def test_after_a_failure_of_ray_its_logs_stay_and_are_named(error, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(type(error)), private_folder() as folder:
        log = _with_a_log(folder)
        raise error
    assert log.read_text() == "a log"
    assert {path.name for path in log.parents[1].iterdir()} == {"logs"}
    assert len(caplog.messages) == 1 and str(folder) in caplog.messages[0]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file" / "below"))
    with pytest.raises(ResourceError, match="no folder for a local Ray below"), private_folder():
        pytest.fail("made")


def test_signals_for_the_driver_do_not_end_the_watch(tmp_path, monkeypatch):
    """A terminal's Ctrl-C goes to everything in its group; a scheduler's SIGTERM to every process of a job."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with private_folder() as folder:
        while not (found := [p for p in psutil.Process().children() if reaper.__file__ in _command(p)]):
            time.sleep(0.05)  # until it is the program and no longer a copy of this process
        (watch,) = found
        time.sleep(1.0)  # until it has set its handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            watch.send_signal(number)
    assert not folder.exists()


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
