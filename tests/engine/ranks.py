"""Run a function on N ranks in fresh processes, gloo over a store in a folder, and never wait for ever.

A program is a module-level function `program(place, arguments)`, named `module:function`; it joins the group
itself (`join_worker`, `join_group`). What it returns is saved and handed back in rank order. The first rank
that ends with another exit code than 0 ends all of them, as does the timeout.
"""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
COLLECTIVE_TIMEOUT_SECONDS = 120.0
GRACE_SECONDS = 1.0


class RanksFailedError(Exception):
    """A rank ended badly or the time was up; the message ends with what that rank wrote last."""


@dataclass(frozen=True)
class Place:
    """Which rank this process is, and where the ranks meet."""

    rank: int
    world_size: int
    folder: Path

    @property
    def port_file(self) -> Path:
        return self.folder / "port"

    def file(self, stem: str, rank: int | None = None) -> Path:
        return self.folder / f"{stem}.{self.rank if rank is None else rank}"


def _environment() -> dict[str, str]:
    settings = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    return {**os.environ, **settings}


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # each rank leads a session of its own
    for process in processes:
        process.wait()


def _what_failed(processes: list[subprocess.Popen[bytes]], folder: Path) -> str:
    # The peers of a rank that raises fail too (connection closed), at times before it has written its result.
    time.sleep(GRACE_SECONDS)
    bad = [(rank, process.poll()) for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
    tails = [(folder / f"log.{rank}").read_text(errors="replace")[-4000:] for rank, _ in bad]
    parts = [f"rank {rank} ended with exit code {code}:\n{tail}" for (rank, code), tail in zip(bad, tails, strict=True)]
    return "\n".join(parts)


def run_on_ranks(
    program: str, world_size: int, folder: Path, arguments: Any = None, timeout_seconds: float = 600.0
) -> list[Any]:
    """What `program` returned on each rank.

    Raises:
        RanksFailedError: a rank's exit code is not 0, or the time is up; no process is left.
    """
    folder.mkdir(parents=True)
    (folder / "arguments").write_bytes(pickle.dumps(arguments))
    processes = []
    for rank in range(world_size):
        command = [sys.executable, "-m", "tests.engine.rank_main", program, str(rank), str(world_size), str(folder)]
        with (folder / f"log.{rank}").open("wb") as log:
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=log, stderr=log, start_new_session=True)
            )
    deadline = time.monotonic() + timeout_seconds
    try:
        while True:
            codes = [process.poll() for process in processes]
            if any(code not in (None, 0) for code in codes):
                raise RanksFailedError(_what_failed(processes, folder))
            if all(code == 0 for code in codes):
                break
            if time.monotonic() > deadline:
                raise RanksFailedError(f"no end after {timeout_seconds} s; exit codes so far {codes}")
            time.sleep(0.05)
    finally:
        _end(processes)
    return [pickle.loads((folder / f"result.{rank}").read_bytes()) for rank in range(world_size)]


def _exchange_port(place: Place, open_port: Any) -> int:
    if place.rank == 0:
        port = int(open_port())
        partial = place.folder / "port.partial"
        partial.write_text(str(port))
        partial.rename(place.port_file)
        return port
    while not place.port_file.exists():
        time.sleep(0.02)
    return int(place.port_file.read_text())


def join_group(place: Place) -> Any:
    """A communicator without the rest of the engine, hence quick to start. All ranks must call this."""
    from distributed_unlearn.engine.communicator import RankSpec, connect, open_store

    store: list[Any] = []

    def open_port() -> int:
        opened, port = open_store(HOST, COLLECTIVE_TIMEOUT_SECONDS)
        store.append(opened)
        return port

    port = _exchange_port(place, open_port)
    spec = RankSpec(place.rank, place.world_size, place.rank, place.world_size)
    return connect(spec, HOST, port, store[0] if store else None, COLLECTIVE_TIMEOUT_SECONDS, use_gpu=False)


def join_worker(place: Place) -> Any:
    """A connected worker. All ranks must call this."""
    from distributed_unlearn.engine.communicator import RankSpec
    from distributed_unlearn.engine.worker import Worker

    worker = Worker(num_threads=1)
    port = _exchange_port(place, lambda: worker.open_rendezvous(HOST, COLLECTIVE_TIMEOUT_SECONDS))
    spec = RankSpec(place.rank, place.world_size, place.rank, place.world_size)
    worker.connect(spec, HOST, port, COLLECTIVE_TIMEOUT_SECONDS, use_gpu=False)
    return worker
