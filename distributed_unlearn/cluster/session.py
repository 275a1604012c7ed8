"""Connect to a Ray cluster, or start one on this machine that nobody else can reach."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from distributed_unlearn.cluster.authentication import ray_address
from distributed_unlearn.cluster.worker_group import RayWorkerGroup
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.errors import ResourceError


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Ray for the length of the block: the given address, the surrounding job's cluster, or a local one.

    Raises:
        ResourceError: no cluster answers at the address, or more workers than this machine has CPUs.
    """
    address = ray_address(config)
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    if address is None:
        cpus = os.cpu_count() or 1
        if config.num_workers * config.cpus_per_worker > cpus:
            raise ResourceError(
                f"{config.num_workers} workers of {config.cpus_per_worker} CPU(s) on a machine with {cpus}",
                f"at most {cpus // config.cpus_per_worker} workers",
                "lower cluster.num_workers or cluster.cpus_per_worker",
            )
        ray.init(
            address="local",
            include_dashboard=False,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise ResourceError(
                f"no answer from a Ray cluster at '{address}' ({str(error).splitlines()[0]})",
                "a running cluster, with RAY_AUTH_MODE and the token set as on its nodes",
                "check cluster.address and RAY_AUTH_MODE, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
            ) from error
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)  # Ray's own, set by init, aborts the process before anything is ended
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def ray_group(config: ClusterConfig) -> Iterator[RayWorkerGroup]:
    """A connected worker group for the length of the block; every worker is ended with it."""
    with ray_session(config):
        group = RayWorkerGroup(config)
        try:
            yield group
        finally:
            group.shutdown()
