"""Two groups of two workers on a cluster, as a program: `python nodes_failures.py GCS MODEL` prints one JSON object.

In the first group one worker raises while the other is in a collective; in the second one worker is stopped.
"""

import contextlib
import json
import os
import signal
import sys
import time

import psutil

from distributed_unlearn.cluster.session import ray_group
from distributed_unlearn.config import ClusterConfig, ModelConfig
from distributed_unlearn.errors import WorkerError


def _failure(action) -> dict[str, object]:
    begun = time.monotonic()
    try:
        action()
    except WorkerError as error:
        return {"got": error.got, "raised": error.raised, "seconds": time.monotonic() - begun}
    return {"got": None}


def _alive(process_ids: tuple[int, ...]) -> list[int]:
    """After some patience, those that still run."""
    deadline = time.monotonic() + 60
    while (left := [pid for pid in process_ids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def main(address: str, model_path: str) -> None:
    model = ModelConfig(path=model_path)
    config = ClusterConfig(address=address, num_workers=2, use_gpu="never", cpus_per_worker=2)  # one on each node
    found = {}
    with ray_group(config) as group:
        first, second = group._actors
        calls = [first.call.remote("open_model", model, "float32", 3), second.call.remote("train_step", 0)]
        found["raise"] = _failure(lambda: group._wait(calls, "open_model"))
        found["raise"]["left"] = _alive(group.process_ids)
    with ray_group(config.model_copy(update={"collective_timeout_seconds": 60.0})) as group:
        stopped = group.process_ids[1]
        os.kill(stopped, signal.SIGSTOP)
        found["stop"] = _failure(lambda: group.call_all("open_model", model, "float32", 3))
        found["stop"] |= {"process": stopped, "left": _alive(group.process_ids)}
        for pid in found["stop"]["left"]:
            os.kill(pid, signal.SIGKILL)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
