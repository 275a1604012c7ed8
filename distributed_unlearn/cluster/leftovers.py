"""Processes of workers that outlived `ray.kill`, as a stopped one does (ray issue 52322): killed, on any node."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distributed_unlearn.cluster.actor import Placement

REMOTE_SECONDS = 30.0
"""How long other nodes may take to answer; one that is gone has nothing left to kill."""


def end_leftovers(placements: Sequence[Placement], everywhere: bool, patience_seconds: float) -> None:
    """Kill what is left of workers after some patience, on this node or on every node where they were."""
    if not placements:
        return
    this_node, by_node = ray.get_runtime_context().get_node_id(), dict[str, list[int]]()
    for placement in placements:
        by_node.setdefault(placement.node_id, []).append(placement.process_id)
    here = by_node.pop(this_node, [])
    task: Any = _end_elsewhere  # Ray's decorator adds `options`
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(processes)
        for node, processes in by_node.items()
        if everywhere
    ]
    _end(here, patience_seconds)
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=REMOTE_SECONDS)


@ray.remote(num_cpus=0, max_retries=0)
def _end_elsewhere(process_ids: list[int]) -> None:
    _end(process_ids, 1.0)


def _end(process_ids: Sequence[int], patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    while (left := [pid for pid in process_ids if _is_rank_actor(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):  # ended since it was last looked at
            os.kill(pid, signal.SIGKILL)


def _is_rank_actor(process_id: int) -> bool:
    """Whether the process still runs and is one of ours (its id may have been given to another)."""
    try:
        with open(f"/proc/{process_id}/cmdline", "rb") as handle:
            return b"RankActor" in handle.read()
    except OSError:
        return False
