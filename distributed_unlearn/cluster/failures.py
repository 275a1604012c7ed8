"""Which worker failed first, and the error that says so: what is heard first is often a peer of the one that died."""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from distributed_unlearn.errors import ResourceError, UserError, WorkerError

# A process of this node is missed within 0.1 s, a node within 2.3 s (measured on an idle machine); ten times that.
PATIENCE_SECONDS = 20.0
# All ranks are asked at once, and only a silent one costs the whole time.
HEARTBEAT_SECONDS = 30.0


class SilentWorkerError(RayError):
    """A worker that neither ended its call nor answered a question after a peer had raised."""

    def __init__(self, rank: int, error: RayError) -> None:
        super().__init__(f"worker {rank} raised: {last_line(error)}")
        self.worker_traceback = str(error)


def first_cause(error: RayError, rank: int, calls: Sequence[Any], actors: Sequence[Any]) -> tuple[RayError, int]:
    """The failure to report, and its rank. `calls` are the pending results of `actors`, in the same order.

    Peers of a worker that died raise ("connection reset"), and may do so before Ray misses it. So where a worker
    raised, the others are waited for until one turns out dead, or each has ended its call or answered a question
    asked now: who lives after the peer failed is not the cause, and who does neither is (a stopped process, for which
    its peers waited in vain).
    """
    if not isinstance(error, RayTaskError) or isinstance(error.cause, UserError):
        return error, rank
    deadline = time.monotonic() + PATIENCE_SECONDS
    waiting = {call: index for index, call in enumerate(calls) if index != rank}
    for index in list(waiting.values()):
        try:
            waiting[actors[index].heartbeat.remote()] = index
        except RayError as death:
            return death, index
    while waiting and (seconds := deadline - time.monotonic()) > 0:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=seconds)
        for answer in ready:
            index = waiting[answer]
            try:
                ray.get(answer)
            except RayTaskError:
                pass  # raised too, so it lives
            except RayError as death:
                return death, index
            waiting = {other: its for other, its in waiting.items() if its != index}
    silent = min(waiting.values(), default=None)
    return (error, rank) if silent is None else (SilentWorkerError(rank, error), silent)


def call_failure(error: RayError, rank: int, method: str) -> UserError:
    """The error that says how a worker failed: a user's mistake as itself, anything of Ray's own as a death."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return cause
    if isinstance(error, OutOfMemoryError):
        return ResourceError(
            f"worker {rank}, which Ray ended during '{method}' because its node ran out of memory "
            f"({' '.join(str(error).split())[:300]})",
            "enough memory on every node for the workers placed there",
            "lower curvature.micro_batch_size, raise cluster.num_workers and spread them over more "
            "nodes, or set curvature.mode to recompute",
        )
    if isinstance(error, SilentWorkerError):
        return WorkerError(
            f"worker {rank}, which does not answer during '{method}' ({last_line(error)})",
            "every worker to finish the call",
            "see whether its process is stopped or its node frozen; nothing was written, so the job can simply be "
            "run again",
            worker_traceback=error.worker_traceback,
        )
    raised = isinstance(error, RayTaskError)
    what = "raised an error" if raised else "died"
    return WorkerError(
        f"worker {rank}, which {what} during '{method}' ({last_line(error)})",
        "every worker to finish the call",
        "see the worker's traceback above; nothing was written, so the job can simply be run again",
        worker_traceback=str(error),
        raised=raised,
    )


def last_line(error: BaseException) -> str:
    """The last line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def states(actors: Sequence[Any]) -> list[str]:
    """What every rank is doing, or that it does not answer; all are asked at once."""
    beats: dict[int, Any] = {}
    for rank, actor in enumerate(actors):
        try:
            beats[rank] = actor.heartbeat.remote()
        except RayError:
            continue
    ready: list[Any] = []
    if beats:
        ready, _ = ray.wait(list(beats.values()), num_returns=len(beats), timeout=HEARTBEAT_SECONDS)
    found = []
    for rank in range(len(actors)):
        try:
            beat = ray.get(beats[rank]) if rank in beats and beats[rank] in ready else None
        except RayError:
            beat = None
        answer = "no answer" if beat is None else f"{beat.method or 'idle'} for {beat.running_seconds:.0f} s"
        found.append(f"rank {rank}: {answer}")
    return found
