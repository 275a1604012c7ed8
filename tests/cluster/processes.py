"""Starts a command with everything that it starts in turn under watch, and ends all of it afterwards.

Ray's processes lead groups of their own and may outlive their parent, so a process group is not enough: the family is
found by descent while parents live, and by a variable that the command's environment carries.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARKER = "DISTRIBUTED_UNLEARN_TEST"


@dataclass
class Running:
    """A started command; `folder` is its working directory and its home."""

    process: subprocess.Popen[bytes]
    folder: Path
    mark: str
    _seen: set[psutil.Process] = field(default_factory=set)

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """The command and all that descends from it, now or when last asked, and still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            command = psutil.Process(self.process.pid)
            self._seen.update([command, *command.children(recursive=True)])
        for other in psutil.process_iter():
            if self._is_marked(other):
                self._seen.add(other)
        return [member for member in self._seen if _runs(member)]

    def _is_marked(self, other: psutil.Process) -> bool:
        try:
            return f"{MARKER}={self.mark}".encode() in Path(f"/proc/{other.pid}/environ").read_bytes()
        except OSError:
            return False

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
        return self.process.wait(timeout=timeout_seconds)

    def survivors(self, patience_seconds: float) -> list[str]:
        """Titles of what still runs after some patience."""
        deadline = time.monotonic() + patience_seconds
        while (family := self.family()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [f"{member.pid} {title(member)}" for member in family]

    def end(self) -> None:
        for _ in range(3):  # what is being started while we kill is found the next time
            for member in self.family():
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            time.sleep(0.1)
        self.process.wait(timeout=30)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return ""


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def environment(folder: Path, mark: str, scratch: str, extra: dict[str, str]) -> dict[str, str]:
    """Ours without Ray's settings, with a home of its own: what a user has who never set up Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = {"HOME": str(folder), "RAY_TMPDIR": scratch, "PYTHONPATH": str(ROOT)}
    return {**kept, **paths, MARKER: mark, "RAY_USAGE_STATS_ENABLED": "0", **extra}


@contextlib.contextmanager
def started(command: Sequence[str], folder: Path, extra: dict[str, str] | None = None) -> Iterator[Running]:
    """Run a command in `folder` for the length of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    # Short: Ray's sockets live there, and a socket's path has at most 107 characters.
    scratch, mark = tempfile.mkdtemp(prefix="ray", dir="/tmp"), secrets.token_hex(8)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        variables = environment(folder, mark, scratch, extra or {})
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    running = Running(process, folder, mark)
    try:
        yield running
    finally:
        running.end()
        shutil.rmtree(scratch, ignore_errors=True)


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distributed_unlearn", *arguments]
