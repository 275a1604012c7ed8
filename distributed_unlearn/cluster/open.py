"""A worker group for a job: Ray actors, or one worker in this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.workers.group import WorkerGroup


@contextmanager
def open_group(config: ClusterConfig) -> Iterator[WorkerGroup]:
    """A connected group for the length of the block; every worker is ended with it.

    Raises:
        ConfigError: no such Ray address can be.
        ResourceError: no cluster answers, or the workers cannot be placed.
    """
    # Imported here: Ray and DeepSpeed take seconds, which a refused job file should not cost.
    if config.backend == "in_process":
        import torch

        if config.use_gpu == "never" or not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed looks for an accelerator by itself
        from distributed_unlearn.cluster.in_process import InProcessGroup

        group = InProcessGroup(config)
        try:
            yield group
        finally:
            group.shutdown()
        return
    from distributed_unlearn.cluster.authentication import secure_local_cluster

    secure_local_cluster(config)  # before Ray is imported
    from distributed_unlearn.cluster.session import ray_group

    with ray_group(config) as connected:
        yield connected
