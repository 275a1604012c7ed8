"""The Ray actor of one rank: the engine's worker behind two methods, and a heartbeat beside it."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from distributed_unlearn.logs import log_event, use_json_lines

if TYPE_CHECKING:  # importing the engine imports DeepSpeed, which must wait until the actor has looked for GPUs
    from distributed_unlearn.engine.communicator import RankSpec

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where an actor landed; ranks are assigned by node, then GPU."""

    node_id: str
    gpu_ids: tuple[str, ...]
    """Numbers, or names where the node's CUDA_VISIBLE_DEVICES holds names (MIG slices)."""
    address: str
    process_id: int
    device_index: int = 0
    """Which of the GPUs that the actor's process sees is the first of `gpu_ids`."""


@dataclass(frozen=True)
class Heartbeat:
    """What an actor answers while a call is running."""

    method: str | None
    running_seconds: float


def device_index(gpu_ids: tuple[str, ...], visible: str | None) -> int:
    """Where the first of `gpu_ids` stands among the devices that a process sees.

    Args:
        gpu_ids: What Ray gave the process, as Ray names it.
        visible: CUDA_VISIBLE_DEVICES of the process. Ray sets it to `gpu_ids`, unless it is told to leave it alone;
            None or empty: every GPU of the node is seen, by its number.
    """
    if not gpu_ids:
        return 0
    if not visible:
        return int(gpu_ids[0]) if gpu_ids[0].isdecimal() else 0
    seen = [name.strip() for name in visible.split(",")]
    return seen.index(gpu_ids[0]) if gpu_ids[0] in seen else 0


# Ray's type stubs do not know concurrency groups.
@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"heartbeat": 1})  # type: ignore[call-overload]
class RankActor:
    """One rank. A collective must never be replayed, so neither the actor nor its calls are retried."""

    def __init__(self, num_threads: int, log_format: str = "text") -> None:
        # Before DeepSpeed looks for an accelerator: without a GPU it must not guess.
        if not ray.get_gpu_ids():
            os.environ["DS_ACCELERATOR"] = "cpu"
        # Imported here for the same reason: DeepSpeed looks when it is imported.
        from distributed_unlearn.engine.memory import out_of_memory_explained
        from distributed_unlearn.engine.worker import Worker

        self._worker, self._explained = Worker(num_threads), out_of_memory_explained
        self._started, self._log_format = time.monotonic(), log_format
        self._method: str | None = None

    def placement(self) -> Placement:
        """Node, GPUs, address and process id."""
        context = ray.get_runtime_context()
        gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        address = ray.util.get_node_ip_address()
        index = device_index(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
        return Placement(context.get_node_id(), gpus, address or socket.gethostname(), os.getpid(), index)

    def open_rendezvous(self, host: str, timeout_seconds: float) -> int:
        """Wait at `host` for the other ranks; returns the port."""
        with self._busy("open_rendezvous"):
            return self._worker.open_rendezvous(host, timeout_seconds)

    def connect(self, spec: "RankSpec", host: str, port: int, timeout_seconds: float, use_gpu: bool) -> None:
        """Meet the other ranks at the rendezvous. All ranks must call this."""
        if self._log_format == "json":
            use_json_lines(spec.rank)
        with self._busy("connect"):
            self._worker.connect(spec, host, port, timeout_seconds, use_gpu)

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of the worker."""
        with self._busy(method):
            return getattr(self._worker, method)(*arguments)

    @contextmanager
    def _busy(self, method: str) -> Iterator[None]:
        """What a heartbeat tells during the block, in which running out of memory is explained."""
        self._method, self._started = method, time.monotonic()
        try:
            with self._explained(method):
                yield
            log_event(_LOG, "call", method=method, seconds=time.monotonic() - self._started)
        finally:
            self._method = None

    @ray.method(concurrency_group="heartbeat")
    def heartbeat(self) -> Heartbeat:
        """Answered in a thread of its own, also while a collective blocks the main one."""
        return Heartbeat(self._method, time.monotonic() - self._started)
