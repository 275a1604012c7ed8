"""N ranks that execute the same method together; `workers.client` says which methods there are."""

from collections.abc import Sequence
from typing import Protocol


class WorkerGroup(Protocol):
    """N ranks that execute the same method together."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def call_all(self, method: str, *arguments: object) -> Sequence[object]:
        """Call a method of every worker with the same arguments; results in rank order.

        The first failure ends all workers and is raised.
        """
        ...

    def call_rank_zero(self, method: str, *arguments: object) -> object:
        """Call a method that is not collective on rank 0."""
        ...

    def share(self, value: object) -> object:
        """Put a large read-only value where every worker can reach it once; pass the result as an argument."""
        ...

    def shutdown(self) -> None:
        """End all workers."""
        ...
