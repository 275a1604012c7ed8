"""Processes that chaos starts, kills and counts: children at fault points or random instants, orphans, a reader."""

import contextlib
import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open

from distributed_unlearn.provenance import hash_folder
from distributed_unlearn.service.fault_points import VARIABLE

_SET_CHILD_SUBREAPER = 36
_FILE_EVENTS = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Plan:
    """When a child is killed; each None: never."""

    fault_point: int | None = None
    """It passes so many points of `service.fault_points`, and dies at the next."""
    file_write: int | None = None
    """It makes so many changes to files below `root`, and dies before the next."""
    seconds: float | None = None
    """After it was started."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Its exit code; minus the signal's number where it was killed."""
    log: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def adopt_orphans() -> None:
    """Whatever outlives its parent below this process becomes this process's own child, and so is seen."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def orphans(known: set[int], patience_seconds: float) -> list[str]:
    """Descendants of this process that still run after some patience, other than the `known` and theirs."""
    deadline = time.monotonic() + patience_seconds
    while True:
        _reap()
        found = [child for child in psutil.Process().children(recursive=True) if _runs(child) and not _of(child, known)]
        if not found or time.monotonic() >= deadline:
            return [f"{child.pid} {_title(child)}" for child in found]
        time.sleep(0.05)


def _reap() -> None:
    """Take note of the ends of adopted children; those of our own are waited for by their number before."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _of(process: psutil.Process, known: set[int]) -> bool:
    try:
        return process.pid in known or any(parent.pid in known for parent in process.parents())
    except psutil.Error:
        return True  # it has just ended


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:160]
    except psutil.Error:
        return ""


def family(root: int, word: str) -> list[psutil.Process]:
    """Descendants of a process whose command line holds a word."""
    try:
        return [child for child in psutil.Process(root).children(recursive=True) if word in _title(child)]
    except psutil.Error:
        return []


def _arm(root: Path, left: int) -> None:
    """Kill this process before its change number `left` to files below `root`."""
    prefix, count = str(root), [left]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, flags = arguments[0], arguments[2]
            if not isinstance(flags, int) or not flags & _WRITES or not isinstance(path, str):
                return
        elif event in _FILE_EVENTS:
            path = arguments[0]
        else:
            return
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
        # A name without its folder is one below an open folder: what `shutil.rmtree` removes.
        if isinstance(path, str) and (path.startswith(prefix) or not os.path.isabs(path)):
            count[0] -= 1
            if count[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def start(work: Callable[[], int], log: Path, plan: Plan, root: Path) -> int:
    """Fork a child that does `work`, whose result is its exit code; returns its number. Output goes to `log`."""
    child = os.fork()
    if child:
        return child
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_DFL)
        if plan.fault_point is not None:
            os.environ[VARIABLE] = str(plan.fault_point)
        if plan.file_write is not None:
            _arm(root, plan.file_write)
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except SystemExit as ended:
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def wait(child: int, log: Path, plan: Plan, limit_seconds: float) -> Ended:
    """The end of a child, which is killed as planned, and in any case after the limit (then the code is 124)."""
    begun, killed_late = time.monotonic(), False
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        passed = time.monotonic() - begun
        if (plan.seconds is not None and passed >= plan.seconds) or passed >= limit_seconds:
            killed_late = plan.seconds is None or passed < plan.seconds
            os.kill(child, signal.SIGKILL)
            found = os.waitpid(child, 0)
            break
        time.sleep(0.005)
    text = log.read_text(errors="replace") if log.exists() else ""
    return Ended(124 if killed_late else os.waitstatus_to_exitcode(found[1]), text)


def run(work: Callable[[], int], log: Path, plan: Plan, root: Path, limit_seconds: float = 300.0) -> Ended:
    """`start` and `wait`."""
    return wait(start(work, log, plan, root), log, plan, limit_seconds)


def random_instant(generator: random.Random, seconds: float) -> Plan:
    """Some time in a stretch of this length."""
    return Plan(seconds=generator.uniform(0.0, seconds))


@dataclass
class Reader:
    """A process that opens what `current` names, over and over, and notes every state that it saw."""

    process: int
    stop: Path
    notes: Path

    def end(self) -> dict[str, object]:
        """What it saw: reads, states with the hashes of their files, and what should not be."""
        self.stop.touch()
        os.waitpid(self.process, 0)
        return dict(json.loads(self.notes.read_text()))


def _read_state(folder: str) -> str:
    """The hashes of a checkpoint's files, after every tensor was read."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                tensors.get_tensor(name)
    json.loads(Path(folder, "config.json").read_text())
    return json.dumps(hash_folder(Path(folder)), sort_keys=True)


def _watch(pointer: Path, stop: Path, notes: Path) -> int:
    seen: dict[str, set[str]] = {}
    reads, superseded, absent, wrong = 0, 0, 0, []
    while not stop.exists():
        state = os.path.realpath(pointer)  # resolved once, as a reader should
        if state == str(pointer):
            absent += 1  # nothing was published yet
        else:
            try:
                seen.setdefault(state, set()).add(_read_state(state))
                reads += 1
            except (OSError, ValueError, SafetensorError) as error:
                if os.path.realpath(pointer) == state:
                    wrong.append(f"{os.path.relpath(state, pointer.parent)}: {type(error).__name__}")
                else:
                    superseded += 1
        time.sleep(0.02)
    states = {os.path.relpath(state, pointer.parent): sorted(files) for state, files in seen.items()}
    notes.write_text(
        json.dumps({"reads": reads, "superseded": superseded, "absent": absent, "wrong": wrong, "states": states})
    )
    return 0


@contextlib.contextmanager
def reading(pointer: Path, folder: Path) -> Iterator[Reader]:
    """A reader of `pointer` for the length of the block; `folder` is for its notes."""
    stop, notes, log = folder / "stop", folder / "seen.json", folder / "reader.log"
    stop.unlink(missing_ok=True)
    reader = Reader(start(lambda: _watch(pointer, stop, notes), log, Plan(), folder), stop, notes)
    try:
        yield reader
    finally:
        with contextlib.suppress(OSError):
            os.kill(reader.process, signal.SIGKILL)
            os.waitpid(reader.process, 0)
