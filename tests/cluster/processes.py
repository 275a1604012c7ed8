"""Starts a command with everything that it starts in turn under watch, and ends all of it afterwards.

Ray's processes lead groups of their own and may outlive their parent, so a process group is not enough: the family is
found by descent while parents live, and by a variable that the command's environment carries. Where the test run itself
dies (pytest-timeout may end it without a word), a watchdog, which is this file run as a program, ends the family.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARKER = "DISTRIBUTED_UNLEARN_TEST"
# Ray gives up on its own processes after 10 to 60 s, which is too soon where ten others want the processor.
PATIENT_RAY = {
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",
    "RAY_gcs_server_request_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "120000",
    "RAY_worker_register_timeout_seconds": "600",
}


@dataclass
class Running:
    """A started command; `folder` is its working directory and its home."""

    process: subprocess.Popen[bytes]
    folder: Path
    mark: str
    scratch: Path
    """Where Ray keeps its sessions."""
    _seen: set[psutil.Process] = field(default_factory=set)

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """The command and all that descends from it, now or when last asked, and still runs."""
        self._seen.update(marked(self.mark))
        return [member for member in self._seen if _runs(member)]

    def actors(self) -> list[psutil.Process]:
        """Processes of rank actors, by process id."""
        found = [member for member in self.family() if "RankActor" in title(member)]
        return sorted(found, key=lambda member: member.pid)

    def wait_until(self, condition: Callable[[], bool], timeout_seconds: float) -> None:
        """Poll while the command runs."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            code = self.process.poll()
            assert code is None, f"ended with {code}:\n{self.out[-2000:]}\n{self.err[-4000:]}"
            assert time.monotonic() < deadline, (
                f"not within {timeout_seconds} s:\n{self.out[-2000:]}\n{self.err[-4000:]}"
            )
            time.sleep(0.1)

    def wait(self, timeout_seconds: float) -> int:
        try:
            return self.process.wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"no end within {timeout_seconds} s:\n{self.out[-2000:]}\n{self.err[-4000:]}"
            ) from None

    def survivors(self, patience_seconds: float) -> list[str]:
        """Titles of what still runs after some patience."""
        deadline = time.monotonic() + patience_seconds
        while (family := self.family()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [f"{member.pid} {title(member)}" for member in family]

    def end(self) -> None:
        kill_all(self.family)
        self.process.wait(timeout=30)


def marked(mark: str) -> set[psutil.Process]:
    """Every process that carries the mark, and its descendants (a process may hide its environment)."""
    text, found = f"{MARKER}={mark}".encode(), set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if text in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.update([process, *process.children(recursive=True)])
    return found


def kill_all(family: Callable[[], Collection[psutil.Process]]) -> None:
    """Kill until nobody is left, for at most 30 s: what is being started while we kill is found only the next time."""
    deadline = time.monotonic() + 30
    while (members := family()) and time.monotonic() < deadline:
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.kill()
        time.sleep(0.1)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return ""


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def environment(folder: Path, mark: str, scratch: str, extra: dict[str, str]) -> dict[str, str]:
    """Ours without Ray's settings, with a home of its own: what a user has who never set up Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = {"HOME": str(folder), "RAY_TMPDIR": scratch, "PYTHONPATH": str(ROOT)}
    return {**kept, **paths, **PATIENT_RAY, MARKER: mark, "RAY_USAGE_STATS_ENABLED": "0", **extra}


@contextlib.contextmanager
def started(command: Sequence[str], folder: Path, extra: dict[str, str] | None = None) -> Iterator[Running]:
    """Run a command in `folder` for the length of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    # Short: Ray's sockets live there, and a socket's path has at most 107 characters.
    scratch, mark = tempfile.mkdtemp(prefix="ray", dir="/tmp"), secrets.token_hex(8)
    variables = environment(folder, mark, scratch, extra or {})
    with _watchdog(mark, scratch):
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                list(command),
                cwd=folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=heed_signals,
            )
        running = Running(process, folder, mark, Path(scratch))
        try:
            yield running
        finally:
            running.end()
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _watchdog(mark: str, scratch: str) -> Iterator[None]:
    """Ends the family if this process dies: the pipe that only we hold open then ends."""
    program = [sys.executable, str(Path(__file__).resolve()), mark, scratch]
    # A session of its own: what kills our process group must not kill it first.
    with subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True) as watchdog:
        try:
            yield
        finally:
            watchdog.kill()  # only while we live


def heed_signals() -> None:
    """In the command, before it is one: a test run in the background (nohup, a shell's &) ignores some signals."""
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distributed_unlearn", *arguments]


if __name__ == "__main__":
    sys.stdin.read()  # until the test run is gone
    kill_all(lambda: [member for member in marked(sys.argv[1]) if _runs(member)])
    shutil.rmtree(sys.argv[2], ignore_errors=True)
