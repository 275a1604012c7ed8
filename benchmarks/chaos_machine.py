"""What a machine does to a service: a full disk, folders that may not be written, clocks that go back, two writers."""

import contextlib
import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from chaos_arena import Arena
from chaos_inputs import Outcomes, one_clear_error
from chaos_processes import Ended, Plan, run, start, wait

from distributed_unlearn.cli import main
from distributed_unlearn.service import ledger as ledger_module
from distributed_unlearn.service.requests import list_requests

_OVERRIDES = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: by these root may write whatever the permissions say."""


def _note(outcomes: Outcomes, kind: str, case: str, ended: Ended, also: frozenset[int] = frozenset()) -> None:
    """A command under bad circumstances ends well or with one clear error. `also`: exit codes without a message."""
    if ended.code not in {0, *also} and (complaint := one_clear_error(ended.code, ended.log)) is not None:
        outcomes.wrong(kind, case, complaint)
    outcomes.note(kind, ended.code)


def _pass_in(arena: Arena, before: Callable[[], object], file: Path | None = None) -> Ended:
    """A pass after `before`, in the same process; it writes into a pipe, which no limit of files meets."""
    reading, writing = os.pipe()

    def work() -> int:
        for stream in (1, 2):
            os.dup2(writing, stream)
        before()
        return main(["rounds", "run-once", str(file or arena.file)])

    ended = run(work, arena.folder / "command.log", Plan(), arena.root, 120.0)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as handle:
        return Ended(ended.code, handle.read())


def full_disk(outcomes: Outcomes, arena: Arena) -> None:
    """No file may grow beyond a limit; then a file system of few kilobytes. Afterwards there is room again."""
    largest = max(path.stat().st_size for path in arena.root.rglob("*") if path.is_file())
    limits = (0, 512, 4096, 16_384, 40_000, 80_000, largest // 2, largest - 1)
    arena.ask()
    for limit in limits:
        _note(
            outcomes,
            "full disk",
            f"files of {limit} bytes",
            _pass_in(arena, lambda n=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))),
        )
        arena.check()
    arena.settle()
    _small_file_systems(outcomes, arena)


def _small_file_systems(outcomes: Outcomes, arena: Arena) -> None:
    """The states on a tmpfs, the ledger elsewhere; needs the right to mount."""
    folder = arena.folder / "small"
    tree = yaml.safe_load(arena.file.read_text())
    for index, kilobytes in enumerate((4, 40, 100, 160, 200, 240, 280, 320, 360, 400)):
        folder.mkdir(exist_ok=True)
        options = f"size={kilobytes}k"
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
        ).returncode:
            return
        try:
            ledger = str(arena.folder / f"small-{index}.db")
            file = arena.folder / "small.yaml"
            file.write_text(yaml.safe_dump(tree | {"folder": str(folder), "ledger": ledger}))
            asked = arena.command("request", "add", "--service", str(file), "--subject", arena.people[0])
            _note(outcomes, "full disk", f"{options}: request add", asked)
            _note(outcomes, "full disk", options, _pass_in(arena, lambda: None, file))
            subprocess.run(["mount", "-o", "remount,size=50m", str(folder)], check=True)
            if (ended := _pass_in(arena, lambda: None, file)).code != 0:
                outcomes.wrong(
                    "full disk", options, f"with room again a pass ended with {ended.code}: {ended.log[-500:]}"
                )
            states = [request.state.value for request in list_requests(ledger_module.open_ledger(ledger))]
            if states != ["erased"]:
                outcomes.wrong("full disk", options, f"with room again the requests are {states}")
            if left := [str(path) for path in folder.rglob(".*")]:
                outcomes.wrong("full disk", options, f"left behind: {left}")
        finally:
            subprocess.run(["umount", str(folder)], check=False)


def _obey_permissions() -> None:
    """Even as root: give up the capabilities that override them."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    data[0] &= ~_OVERRIDES
    libc.capset(header, data)


def read_only(outcomes: Outcomes, arena: Arena) -> None:
    """One folder or file after the other that may not be written."""
    arena.ask()

    def add_obediently() -> int:
        _obey_permissions()
        return main(["request", "add", "--service", str(arena.file), "--subject", arena.people[-1]])

    places = (".", "states", "certificates", "ledger.db", "ledger.db-wal", "current", "states/round-0001")
    for place in places:
        path = arena.root / place
        if not path.exists():
            continue
        mode = path.stat().st_mode & 0o777
        path.chmod(mode & 0o555)
        try:
            ended = _pass_in(arena, _obey_permissions)
        finally:
            path.chmod(mode)
        _note(outcomes, "read-only", place, ended)
        arena.check()
        path.chmod(mode & 0o555)
        try:
            _note(
                outcomes,
                "read-only",
                f"{place}: add",
                run(add_obediently, arena.folder / "command.log", Plan(), arena.root),
            )
        finally:
            path.chmod(mode)
        arena.check()
    arena.settle()


def clocks(outcomes: Outcomes, arena: Arena, seed: int) -> None:
    """A clock that stands, jumps forth and back by hours and years between passes, and runs backwards inside one."""
    generator = random.Random(seed)

    def at(shift: Callable[[], timedelta]) -> Callable[[], None]:
        def set_clock() -> None:
            ledger_module.open_ledger.__defaults__ = (False, lambda: datetime.now(UTC) + shift())

        return set_clock

    went = [timedelta(0)]

    def backwards() -> timedelta:
        went[0] -= timedelta(seconds=generator.uniform(0, 3600))
        return went[0]

    shifts = [timedelta(hours=hours) for hours in (-1, -30, 2, -24 * 365 * 10, 0, -100)]
    for shift in [*(lambda s=s: s for s in shifts), backwards, lambda: timedelta(hours=generator.uniform(-40, 40))]:
        arena.ask()
        _note(outcomes, "clock", str(shift), _pass_in(arena, at(shift)))
        arena.check()
    arena.settle()


def two_writers(outcomes: Outcomes, arena: Arena, times: int) -> None:
    """Two passes at once, one that is stopped while another takes over, and many who ask for the same at once."""
    log, other = arena.folder / "command.log", arena.folder / "other.log"
    work = lambda: main(["rounds", "run-once", str(arena.file)])  # noqa: E731
    for number in range(times):
        arena.ask()
        children = [(start(work, path, Plan(), arena.root), path) for path in (log, other)]
        ended = [wait(child, path, Plan(), 120.0) for child, path in children]
        for one in ended:
            _note(outcomes, "two writers", f"two passes {number}", one)
        if not any(one.code == 0 for one in ended):
            outcomes.wrong("two writers", f"two passes {number}", f"ended with {[one.code for one in ended]}")
        arena.check()
    for number in range(times):
        arena.ask()
        paused = start(work, other, Plan(), arena.root)
        time.sleep(0.4 + 0.5 * number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(paused, signal.SIGSTOP)
        time.sleep(arena.config.lease_seconds + 1)
        _note(outcomes, "two writers", f"takes over {number}", arena.one_pass())
        os.kill(paused, signal.SIGCONT)
        _note(outcomes, "two writers", f"paused {number}", wait(paused, other, Plan(), 120.0))
        arena.check()
    _many_at_once(outcomes, arena)
    arena.settle()


def _many_at_once(outcomes: Outcomes, arena: Arena) -> None:
    before = len(list_requests(arena.ledger))
    asks = ["request", "add", "--service", str(arena.file), "--subject", arena.people[-1], "--external-id", "same"]
    logs = [arena.folder / f"asks-{index}.log" for index in range(6)]
    children = [start(lambda: main(asks), log, Plan(), arena.root) for log in logs]
    for child, log in zip(children, logs, strict=True):
        _note(outcomes, "two writers", "the same request", wait(child, log, Plan(), 120.0))
    if len(list_requests(arena.ledger)) != before + 1:
        outcomes.wrong("two writers", "the same request", "is not there once")
    shutil.rmtree(arena.folder / "none", ignore_errors=True)
