"""Ends what a local Ray leaves behind: a program that waits until its driver is done or dead, started beside it.

A driver that is killed ends nothing: Ray's agents notice it after 60 to 90 seconds and its session folder stays. This
program holds the other end of a pipe of the driver's, so it learns of the driver's end, however it comes; it is run by
its path, with the standard library alone.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

MARK = "DISTRIBUTED_UNLEARN_RAY"
"""The environment variable that every process of a local Ray carries: the folder that Ray was given."""
KEEP_LOGS = b"keep logs\n"
"""Written into the pipe by a driver that has seen a failure."""
PATIENCE_SECONDS = 30.0


def marked(folder: str, driver: int) -> set[int]:
    """Processes that carry the mark of `folder`, Ray's that hold a file in it open, and all that descends from them.

    Ray's agents write their titles over their environment, and outlive their parent; but they have their logs open.
    So has the driver as long as it lives, which with all else that it started is none of them.
    """
    mark = f"{MARK}={folder}".encode()
    found, parents = set[int](), dict[int, int]()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            number = int(entry.name)
            parents[number] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if number in (driver, os.getpid()):
                continue
            if mark in (entry / "environ").read_bytes().split(b"\0") or _has_open(entry, f"{folder}/"):
                found.add(number)
    while children := {number for number, parent in parents.items() if parent in found} - found:
        found |= children
    return found


def _has_open(process: Path, prefix: str) -> bool:
    if not (process / "cmdline").read_bytes().startswith(b"ray::"):
        return False  # somebody who reads the logs
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed since
            if os.readlink(descriptor).startswith(prefix):
                return True
    return False


def end_all(folder: str, driver: int) -> None:
    """Kill until nobody is left: what was just being started is found only the next time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (processes := marked(folder, driver)) and time.monotonic() < deadline:
        for process in processes:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def sessions_with_logs(folder: Path) -> list[Path]:
    """Ray's sessions in its folder that have logs; not the link to the latest."""
    return [path.parent for path in folder.glob("*/logs") if not path.parent.is_symlink()]


def remove(folder: Path, keep_logs: bool) -> None:
    """Remove Ray's folder, but for the logs of its sessions where they are to be kept."""
    if not keep_logs:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for session in sessions_with_logs(folder):
        for path in session.iterdir():
            if path.name != "logs":
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the driver, whose end is waited for
    driver = int(sys.argv[2])  # by its own word: it may be dead already
    asked = sys.stdin.buffer.read()
    end_all(sys.argv[1], driver)
    remove(Path(sys.argv[1]), keep_logs=asked == KEEP_LOGS)
