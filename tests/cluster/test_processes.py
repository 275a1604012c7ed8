"""The watch over started commands: nothing outlives the block, nor a test run that dies."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import marked, started

pytestmark = pytest.mark.timeout(300, method="signal")

# Starts a child that leads a session of its own and outlives it, as Ray's do.
LEAVES_A_CHILD = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"], start_new_session=True)
time.sleep(float(sys.argv[1]))
"""

DIES = f"""
import os, sys, time
from pathlib import Path
from processes import started
with started([sys.executable, "-c", '''{LEAVES_A_CHILD}''', "900"], Path(sys.argv[1])) as running:
    while len(running.family()) < 2:
        time.sleep(0.05)
    print(running.mark, *[member.pid for member in running.family()], flush=True)
    os._exit(1)
"""


def _living(pids: list[int], patience_seconds: float) -> list[int]:
    deadline = time.monotonic() + patience_seconds
    while (living := [pid for pid in pids if _lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return living


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_child_ends_with_the_block_though_its_parent_is_gone(tmp_path):
    with started([sys.executable, "-c", LEAVES_A_CHILD, "0.5"], tmp_path) as running:
        assert running.wait(200) == 0
        (child,) = running.family()
        assert running.survivors(patience_seconds=0.5) == [f"{child.pid} {' '.join(child.cmdline())[:120]}"]
    assert _living([child.pid], 0) == []


def test_everything_ends_with_a_test_run_that_dies(tmp_path):
    """As pytest-timeout lets it: without a word to anyone."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(
        [sys.executable, "-c", DIES, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1, run.stderr
    mark, *pids = run.stdout.split()
    assert len(pids) == 2
    assert _living([int(pid) for pid in pids], 60) == [] and marked(mark) == set()


def test_an_end_that_does_not_come_shows_what_was_written(tmp_path):
    program = "import time; print('so far', flush=True); time.sleep(900)"
    with started([sys.executable, "-c", program], tmp_path) as running:
        running.wait_until(lambda: "so far" in running.out, 60)
        with pytest.raises(AssertionError, match="no end within 0.2 s:\nso far"):
            running.wait(0.2)
