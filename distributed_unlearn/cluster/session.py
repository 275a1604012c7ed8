"""Connect to a Ray cluster, or start one on this machine that nobody else can reach."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError

from distributed_unlearn.cluster.authentication import ray_address
from distributed_unlearn.cluster.failures import last_line
from distributed_unlearn.cluster.local_ray import private_folder
from distributed_unlearn.cluster.worker_group import RayWorkerGroup
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.errors import ResourceError, WorkerError

# Ray allows its own processes 30 s, which a busy machine may need a second time.
START_ATTEMPTS = 3


def _start(config: ClusterConfig, folder: Path) -> None:
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                dashboard_host="127.0.0.1",
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # of any type: Ray raises a bare Exception for a start that takes long
            if "timed out during startup" in str(error) and attempt + 1 < START_ATTEMPTS:
                ray.shutdown()
                continue
            raise ResourceError(
                f"no local Ray ({_first_line(error)})",
                "a machine where Ray can start; with RAY_AUTH_MODE=token in the environment, a token beside it",
                "unset RAY_AUTH_MODE, see Ray's logs, or do without Ray "
                "(cluster.backend=in_process cluster.num_workers=1)",
            ) from error


def _require_cpus(config: ClusterConfig) -> None:
    cpus = os.cpu_count() or 1
    if config.num_workers * config.cpus_per_worker > cpus:
        raise ResourceError(
            f"{config.num_workers} workers of {config.cpus_per_worker} CPU(s) on a machine with {cpus}",
            f"at most {cpus // config.cpus_per_worker} workers",
            "lower cluster.num_workers or cluster.cpus_per_worker",
        )


def _join(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of any type: no such host, no token, another version, a head that is just ending
        raise ResourceError(
            f"no answer from a Ray cluster at '{address}' ({_first_line(error)})",
            "a running cluster, with RAY_AUTH_MODE and the token set as on its nodes",
            "check cluster.address and RAY_AUTH_MODE, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Ray for the length of the block: the given address, the surrounding job's cluster, or a local one.

    Raises:
        ConfigError: no such address can be.
        ResourceError: no cluster answers at the address, or more workers than this machine has CPUs.
    """
    address = ray_address(config)
    if ray.is_initialized():
        yield
        return
    if address is not None:
        with _connected(lambda: _join(address)):
            yield
        return
    _require_cpus(config)
    with private_folder() as folder, _connected(lambda: _start(config, folder)):
        yield


@contextmanager
def _connected(connect: Callable[[], None]) -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            connect()
        finally:
            if callable(handler):
                signal.signal(signal.SIGTERM, handler)  # Ray's own aborts the process before anything is ended
        yield
    finally:
        ray.shutdown()  # also what a failed init has started


@contextmanager
def ray_group(config: ClusterConfig) -> Iterator[RayWorkerGroup]:
    """A connected worker group for the length of the block; every worker is ended with it.

    Raises:
        WorkerError: a worker failed, or Ray itself did.
    """
    with ray_session(config):
        try:
            group = RayWorkerGroup(config)
            try:
                yield group
            finally:
                group.shutdown()
        except RayError as error:  # outside a worker's call, which says itself what it met: a head that is gone
            raise WorkerError(
                f"a failure of Ray itself ({type(error).__name__}: {last_line(error)})",
                "a cluster that lasts as long as the job",
                "see Ray's logs on the head; nothing was written, so the job can simply be run again",
                worker_traceback=str(error),
            ) from error
