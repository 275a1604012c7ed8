"""A Ray cluster of several nodes on this machine, as a program: `python nodes.py FOLDER PORT ...`, ended by a signal.

Each node has a raylet and two CPUs of its own; the head has none. It writes `FOLDER/up` (the address of the GCS) when
all are up. When `FOLDER/kill` appears it stops the workers of one node, so that their peers wait for them in a
collective, then kills everything of that node, and writes `FOLDER/killed`.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

NUM_NODES, CPUS_EACH, ATTEMPTS = 3, 2, 6


def _family() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _workers(raylet: int) -> list[psutil.Process]:
    return [
        child for child in psutil.Process(raylet).children(recursive=True) if "RankActor" in " ".join(child.cmdline())
    ]


def _kill_a_busy_node(nodes: list, folder: Path) -> None:
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    victim = next(raylet for raylet in raylets if _workers(raylet))
    workers = _workers(victim)
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    for process in (psutil.Process(victim), *psutil.Process(victim).children(recursive=True)):
        process.kill()
    (folder / "killed").write_text(" ".join(str(worker.pid) for worker in workers))


def _patiently(add: Callable[[], Any]) -> Any:
    """Ray gives a node 30 s to start, which a busy machine may need several times."""
    before = _family()
    for attempt in range(ATTEMPTS):
        try:
            return add()
        except Exception as error:  # a bare one
            if "timed out during startup" not in str(error) or attempt + 1 == ATTEMPTS:
                raise
            for late in _family() - before:  # it would join later
                with contextlib.suppress(psutil.Error):
                    late.kill()


def main(folder: Path, port: int, agent_ports: Sequence[int]) -> None:
    from ray.cluster_utils import Cluster

    common = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    cluster = Cluster()
    _patiently(lambda: cluster.add_node(**common, **head, dashboard_agent_listen_port=agent_ports[0]))
    nodes = [
        _patiently(lambda p=port: cluster.add_node(num_cpus=CPUS_EACH, **common, dashboard_agent_listen_port=p))
        for port in agent_ports[1 : 1 + NUM_NODES]
    ]
    (folder / "up").write_text(cluster.address)
    while True:
        if (folder / "kill").exists():
            (folder / "kill").unlink()
            _kill_a_busy_node(nodes, folder)
        time.sleep(0.1)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]), int(sys.argv[2]), [int(port) for port in sys.argv[3:]])
