"""A worker group of one, in this very process and without Ray: for a laptop, a debugger or a lone GPU."""

from typing import Any

import torch

from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.engine.communicator import RankSpec
from distributed_unlearn.engine.memory import out_of_memory_explained
from distributed_unlearn.engine.worker import Worker
from distributed_unlearn.errors import ResourceError


class InProcessGroup:
    """One worker, the same program as under Ray, on a process group of one."""

    def __init__(self, config: ClusterConfig) -> None:
        """Connect the worker to itself.

        Raises:
            ResourceError: a GPU is demanded and there is none.
        """
        if config.use_gpu == "always" and not torch.cuda.is_available():
            raise ResourceError(
                "cluster.use_gpu 'always' where torch finds no GPU",
                "a GPU and a CUDA build of torch",
                "set cluster.use_gpu to auto or never",
            )
        use_gpu = config.use_gpu != "never" and torch.cuda.is_available()
        self._worker = Worker(num_threads=config.cpus_per_worker)
        host, timeout = "127.0.0.1", config.collective_timeout_seconds
        port = self._worker.open_rendezvous(host, timeout)
        self._worker.connect(RankSpec(0, 1, 0, 1), host, port, timeout, use_gpu)

    @property
    def world_size(self) -> int:
        """Always 1."""
        return 1

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a worker method; a failure is raised as it is."""
        return [self.call_rank_zero(method, *arguments)]

    def call_rank_zero(self, method: str, *arguments: Any) -> Any:
        """Call a worker method."""
        with out_of_memory_explained(method):
            return getattr(self._worker, method)(*arguments)

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def shutdown(self) -> None:
        """Drop the model; the process group lasts as long as the process."""
        self._worker.close_model()
