"""Numbers of runs and of the service for Prometheus, by Ray's own exporter on the node of the driver.

Ray keeps the last value of every gauge as long as the process that set it lives, and adds the prefix `ray_`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.metrics import Counter, Gauge

from distributed_unlearn.cluster.session import ray_session
from distributed_unlearn.config import ClusterConfig

PREFIX = "distributed_unlearn"


class Metrics:
    """What this process exports; nothing while it is connected to no Ray."""

    def __init__(self) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"{PREFIX}_{name}", text)

        self._products_per_second = gauge("products_per_second", "curvature products a second, of the last step")
        self._step = {
            "alpha": gauge("alpha", "dual variable of the cubic model, of the last step"),
            "gamma": gauge("gamma", "implied damping, of the last step"),
            "residual": gauge("residual", "the model's residual over the gradient's norm, of the last step"),
            "loss": gauge("loss", "objective at the start of the last step"),
        }
        self._products = Counter(f"{PREFIX}_products", "curvature products")
        self._steps = Counter(f"{PREFIX}_steps", "outer steps")
        self._phase = Counter(f"{PREFIX}_phase_seconds", "seconds spent in each phase of runs", tag_keys=("phase",))
        self._queue = gauge("queue_length", "erasure requests without an answer")
        self._oldest = gauge("oldest_request_seconds", "age of the oldest request without an answer; 0 without one")

    def step(self, seconds: float, num_products: int, values: dict[str, float | None]) -> None:
        """One outer step.

        Args:
            seconds: Its wall time.
            num_products: Curvature products in it.
            values: `alpha`, `gamma`, `residual`, `loss`; what was not measured is left as it was.
        """
        if not ray.is_initialized():
            return
        self._steps.inc()
        if num_products:
            self._products.inc(num_products)
        if seconds > 0:
            self._products_per_second.set(num_products / seconds)
        for name, value in values.items():
            if value is not None:
                self._step[name].set(value)

    def phase(self, name: str, seconds: float) -> None:
        """Seconds spent in a phase."""
        if ray.is_initialized() and seconds > 0:
            self._phase.inc(seconds, tags={"phase": name})

    def queue(self, length: int, oldest_seconds: float | None) -> None:
        """Requests that wait for an answer."""
        if ray.is_initialized():
            self._queue.set(length)
            self._oldest.set(oldest_seconds or 0.0)


@contextmanager
def metrics_of_scheduler(config: ClusterConfig) -> Iterator[Metrics]:
    """For a process that runs no round itself: connected to its cluster for the length of the block.

    Raises:
        ResourceError: no cluster answers.
    """
    with ray_session(config):
        yield Metrics()
