"""Kills of what passes stand on: the scheduler, the database, and Ray's workers, raylet, head and driver."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from chaos_arena import Arena, Counts
from chaos_processes import Plan, family, reading, start, wait

from distributed_unlearn.cli import main
from tests.cluster.processes import PATIENT_RAY, heed_signals
from tests.service.postgresql import MissingServerError, find_programs


@contextlib.contextmanager
def _watched(arena: Arena) -> Iterator[None]:
    """A reader for the length of the block; in the end everything settles."""
    with reading(arena.root / "current", arena.folder) as reader:
        arena.known.add(reader.process)
        yield
        arena.settle()
        arena.tally(reader.end())
        arena.known.discard(reader.process)


def schedulers(folder: Path, counts: Counts, seed: int, most: int) -> None:
    """`rounds schedule` is killed at random instants, with whatever pass it runs; who supervises it starts it again."""
    schedule = {"cron": "* * * * *", "watch_minutes": 0.05}
    arena = Arena(folder, counts, schedule=schedule, requests={"warn_days": 60})
    generator = random.Random(seed)
    command = [sys.executable, "-m", "distributed_unlearn", "rounds", "schedule", str(arena.file)]
    with _watched(arena):
        for _ in range(most):
            arena.ask()
            with (folder / "scheduler.log").open("ab") as log:
                scheduler = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=heed_signals)
            time.sleep(generator.uniform(2.0, 30.0))
            if scheduler.poll() is not None:
                arena.wrong(f"the scheduler ended with {scheduler.returncode}")
                continue
            scheduler.kill()
            scheduler.wait()
            counts.restarts += 1
            arena.killed("scheduler", orphans_seconds=30.0)


@dataclass
class Postgres:
    """A server of the machine's own packages, on a socket in a folder of its own."""

    folder: Path
    programs: Path
    user: str | None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.folder}"

    def call(self, program: str, *arguments: str) -> bool:
        command = [str(self.programs / program), *arguments]
        done = subprocess.run(command, user=self.user, cwd=self.folder, capture_output=True, timeout=120)
        return done.returncode == 0

    def start(self) -> None:
        """Also after a crash, once the processes of the last one have gone."""
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder}"
        deadline = time.monotonic() + 60
        while not self.call("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start"):
            if time.monotonic() > deadline:
                raise AssertionError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.2)

    def process(self) -> int:
        return int((self.folder / "data" / "postmaster.pid").read_text().splitlines()[0])


@contextlib.contextmanager
def _postgres() -> Iterator[Postgres]:
    programs = find_programs()
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # the socket's path must be short
    user = "postgres" if os.geteuid() == 0 else None
    try:
        if user is not None:
            shutil.chown(folder, user)
        server = Postgres(folder, programs, user)
        if not server.call("initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8"):
            raise MissingServerError("initdb failed")
        server.start()
        try:
            yield server
        finally:
            server.call("pg_ctl", "-D", "data", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def databases(folder: Path, counts: Counts, seed: int, most: int, seconds: float) -> str | None:
    """PostgreSQL is killed while a pass runs, and started again; says why where there is none."""
    generator = random.Random(seed)
    try:
        with _postgres() as server:
            arena = Arena(folder, counts, ledger=server.url)
            arena.known.add(server.process())
            with _watched(arena):
                for number in range(most):
                    if number % 3 == 0:
                        arena.ask()
                    _kill_database(arena, server, generator.uniform(0.0, seconds))
    except MissingServerError as error:
        return str(error)
    return None


def _kill_database(arena: Arena, server: Postgres, seconds: float) -> None:
    log = arena.folder / "command.log"
    child = start(lambda: main(["rounds", "run-once", str(arena.file)]), log, Plan(), arena.root)
    time.sleep(seconds)
    postmaster = server.process()
    os.kill(postmaster, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(postmaster, 0)  # ours by adoption; PostgreSQL takes a zombie for a server that runs
    ended = wait(child, log, Plan(), 120.0)
    if ended.code not in (0, 11) or "Traceback" in ended.log:
        arena.wrong(f"the database was killed, and the pass ended with {ended.code}: {ended.log[-600:]}")
    server.start()
    arena.known.add(server.process())
    arena.counts.restarts += 1
    arena.killed("database", orphans_seconds=20.0)


RAY_TARGETS = {"worker": "RankActor", "raylet": "raylet/raylet", "head (GCS)": "gcs_server"}


def ray(folder: Path, counts: Counts, seed: int, kills_by_target: dict[str, int]) -> None:
    """A pass on a Ray of its own with two workers; one of its processes is killed some seconds after it appeared."""
    generator = random.Random(seed)
    os.environ.update(PATIENT_RAY)
    cluster = {"backend": "ray", "num_workers": 2, "call_timeout_seconds": 120.0}
    scratch = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's logs: short, because sockets lie there too
    os.environ["RAY_TMPDIR"] = scratch
    try:
        arena = Arena(folder, counts, cluster=cluster)
        with _watched(arena):
            arena.ask()
            for target, number in kills_by_target.items():
                for _ in range(number):
                    arena.ask()
                    _kill_below(arena, target, generator.uniform(0.0, 8.0))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _kill_below(arena: Arena, target: str, seconds: float) -> None:
    log = arena.folder / "command.log"
    driver = start(lambda: main(["rounds", "run-once", str(arena.file)]), log, Plan(), arena.root)
    word, deadline, victims = RAY_TARGETS.get(target, "RankActor"), time.monotonic() + 240, []
    while not (victims := family(driver, word)) and time.monotonic() < deadline and psutil.pid_exists(driver):
        time.sleep(0.1)
    time.sleep(seconds)
    if target == "driver with Ray":
        victims = [psutil.Process(driver)]
    killed = False
    for victim in victims[:1]:
        with contextlib.suppress(psutil.Error):
            victim.kill()
            killed = True
    begun = time.monotonic()
    ended = wait(driver, log, Plan(), 240.0)
    arena.counts.restarts += 1
    allowed = (0, 6, 8, -signal.SIGKILL) if target == "driver with Ray" else (0, 6, 8)
    if ended.code not in allowed:
        arena.wrong(f"{target} was killed, and the pass ended with {ended.code}: {ended.log[-900:]}")
    if killed:
        arena.killed(f"ray: {target}", orphans_seconds=45.0)
        arena.counts.slowest_end_seconds = max(arena.counts.slowest_end_seconds, time.monotonic() - begun)
    else:
        arena.check(45.0)
