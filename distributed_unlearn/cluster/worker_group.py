"""N rank actors in one placement group, driven as one: every call goes to all, the first failure ends all."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distributed_unlearn.cluster.actor import Placement, RankActor
from distributed_unlearn.cluster.authentication import ray_address
from distributed_unlearn.cluster.failures import SilentWorkerError, call_failure, first_cause, states
from distributed_unlearn.cluster.leftovers import end_leftovers
from distributed_unlearn.cluster.pulse import HEAD_SECONDS, LOCAL_HEAD_SECONDS, HeadPulse, WorkerPulse
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.engine.communicator import RankSpec
from distributed_unlearn.errors import ResourceError, WorkerError

POLL_SECONDS = 2  # whole seconds: Ray cuts the fraction off
_log = logging.getLogger(__name__)


def _needs(config: ClusterConfig) -> dict[str, float]:
    bundle: dict[str, float] = {"CPU": float(config.cpus_per_worker)}
    if config.use_gpu == "always" or (config.use_gpu == "auto" and ray.cluster_resources().get("GPU", 0) > 0):
        bundle["GPU"] = config.gpus_per_worker
    return bundle


def check_capacity(config: ClusterConfig) -> None:
    """Refuse a job that the cluster, as it is now, cannot place.

    Raises:
        ResourceError: fewer CPUs or GPUs in the whole cluster than the workers need.
    """
    bundle, total = _needs(config), ray.cluster_resources()
    for kind, amount in bundle.items():
        if amount * config.num_workers > total.get(kind, 0):
            raise ResourceError(
                f"{config.num_workers} workers of {amount:g} {kind} on a cluster with {total.get(kind, 0):g} {kind}",
                f"at most {int(total.get(kind, 0) // amount)} workers",
                "lower cluster.num_workers, add nodes, or, for GPUs, lower cluster.gpus_per_worker or set "
                "cluster.use_gpu to never",
            )


def _by_number(gpu: str) -> tuple[int, int, str]:
    """Sorts GPU 10 after GPU 9, and names (of MIG slices, say) by their text after all numbers."""
    return (0, int(gpu), "") if gpu.isdecimal() else (1, 0, gpu)


def assign_ranks(placements: list[Placement]) -> list[RankSpec]:
    """Ranks by node, then lowest GPU, so that a node's ranks are consecutive; aligned with `placements`.

    Where any two are on one GPU all are told so: a group has one backend.
    """

    def place(index: int) -> tuple[object, ...]:
        return placements[index].node_id, [_by_number(gpu) for gpu in placements[index].gpu_ids], index

    order = sorted(range(len(placements)), key=place)
    per_node: dict[str, int] = {}
    specs: dict[int, tuple[int, int]] = {}
    for rank, index in enumerate(order):
        node = placements[index].node_id
        specs[index] = (rank, per_node.get(node, 0))
        per_node[node] = per_node.get(node, 0) + 1
    places = [(placement.node_id, placement.gpu_ids[0]) for placement in placements if placement.gpu_ids]
    shares_device = len(set(places)) < len(places)
    return [
        RankSpec(
            *(specs[i][0], len(placements), specs[i][1], per_node[placement.node_id]),
            device_index=placement.device_index,
            shares_device=shares_device,
        )
        for i, placement in enumerate(placements)
    ]


class RayWorkerGroup:
    """A connected group of rank actors.

    Raises:
        ResourceError: the workers cannot be placed, or not in time.
        WorkerError: a worker raised, died or hung; the others have been ended.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._actors: list[Any] = []
        self._placements: list[Placement] = []
        self._placement_group: PlacementGroup | None = None
        is_local = ray_address(config) is None
        patience = LOCAL_HEAD_SECONDS if is_local else HEAD_SECONDS
        self._head = HeadPulse(ray.get_runtime_context().gcs_address, patience)
        self._pulse: WorkerPulse | None = None
        if is_local:
            check_capacity(config)  # a local Ray never grows
        try:
            self._start(*self._reserve())
        except BaseException:
            self.shutdown()
            raise

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._config.num_workers

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Process id of every rank, in rank order."""
        return tuple(placement.process_id for placement in self._placements)

    def _reserve(self) -> tuple[dict[str, float], PlacementGroup]:
        """What one worker gets, and the place that holds it for all of them; waits for the cluster to have room.

        Nodes may join a cluster for minutes, and an autoscaler starts some only for a reservation that waits. So the
        place is reserved first, and again whenever nodes that joined or left change what a worker gets (a first GPU).
        """
        config, reserved = self._config, None
        deadline, announced = time.monotonic() + config.placement_timeout_seconds, False
        while True:
            self._head.check()
            bundle = _needs(config)
            if bundle != reserved:
                self._give_place_back()
                self._placement_group = placement_group([bundle] * config.num_workers, strategy="PACK")
                reserved = bundle
            place = self._placement_group
            assert place is not None
            if place.wait(POLL_SECONDS):  # short, because it also keeps signals waiting
                if bundle == _needs(config):  # else the node that made room brought the first GPU
                    return bundle, place
            elif time.monotonic() >= deadline:
                check_capacity(config)
                raise ResourceError(
                    f"no room for {config.num_workers} workers within {config.placement_timeout_seconds:g} s",
                    "free CPUs or GPUs for all workers at once",
                    "wait for other jobs, add nodes, or raise cluster.placement_timeout_seconds",
                )
            elif not announced:
                text = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
                seconds = config.placement_timeout_seconds
                _log.warning("waiting up to %g s for room for %d workers of %s", seconds, config.num_workers, text)
                announced = True

    def _start(self, bundle: dict[str, float], place: PlacementGroup) -> None:
        config = self._config
        actor_class: Any = RankActor  # Ray's decorator adds `options`
        for index in range(config.num_workers):
            actor = actor_class.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, index),
            ).remote(config.cpus_per_worker, config.log_format)
            self._actors.append(actor)  # one by one, so that a failure among them leaves none behind
        actors = list(self._actors)
        placements = self._wait([actor.placement.remote() for actor in actors], "placement")
        specs = assign_ranks(placements)
        by_rank = sorted(range(len(actors)), key=lambda index: specs[index].rank)
        self._actors = [actors[index] for index in by_rank]
        self._placements = [placements[index] for index in by_rank]
        # Only now: an actor that is still importing cannot answer.
        self._pulse = WorkerPulse(self._actors, self._placements, config.collective_timeout_seconds)
        host, timeout = self._placements[0].address, config.collective_timeout_seconds
        (port,) = self._wait([self._actors[0].open_rendezvous.remote(host, timeout)], "open_rendezvous")
        ordered = sorted(specs, key=lambda spec: spec.rank)
        refs = [
            actor.connect.remote(spec, host, port, timeout, "GPU" in bundle)
            for actor, spec in zip(self._actors, ordered, strict=True)
        ]
        self._wait(refs, "connect")

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a worker method on every rank; results in rank order."""
        return self._wait([actor.call.remote(method, *arguments) for actor in self._actors], method)

    def call_rank_zero(self, method: str, *arguments: Any) -> Any:
        """Call a method that is not collective on rank 0."""
        return self._wait([self._actors[0].call.remote(method, *arguments)], method)[0]

    def share(self, value: Any) -> Any:
        """Put a value once into the object store; workers of a node read it in shared memory."""
        return ray.put(value)

    def _wait(self, refs: list[Any], method: str) -> list[Any]:
        """Results of all calls, or the first failure, whichever rank it comes from."""
        assert refs, "the workers have been ended"
        deadline = time.monotonic() + self._config.call_timeout_seconds
        pending, found = list(refs), {}
        while pending:
            self._check_pulses(method)
            seconds = min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
            ready, pending = ray.wait(pending, num_returns=1, timeout=seconds)
            if not ready and time.monotonic() >= deadline:
                raise self._hung(method)
            for ref in ready:
                try:
                    found[ref] = ray.get(ref)
                except RayError as error:
                    cause, rank = first_cause(error, refs.index(ref), refs, self._actors)
                    self.shutdown(silent=isinstance(cause, SilentWorkerError))
                    raise call_failure(cause, rank, method) from None
        return [found[ref] for ref in refs]

    def _check_pulses(self, method: str) -> None:
        """Name what is silent; end all workers and raise where it is so for too long."""
        try:
            self._head.check()
            if self._pulse is not None:
                self._pulse.check(method)
        except WorkerError:
            self.shutdown(silent=True)
            raise

    def _hung(self, method: str) -> WorkerError:
        """Ask every actor what it is doing, name the silent ones, end all."""
        answers = "; ".join(states(self._actors))
        self.shutdown(silent=True)
        return WorkerError(
            f"a call of '{method}' that took over {self._config.call_timeout_seconds:g} s ({answers})",
            "an answer of every worker in that time",
            "raise cluster.call_timeout_seconds if the call is rightly that long, else look at the silent worker",
        )

    def shutdown(self, silent: bool = False) -> None:
        """End all workers and give their place back; safe to call twice.

        Raises nothing, since another error is often on its way: what cannot be ended is logged. `silent`: one did not
        answer, so that every node is looked at for processes that Ray cannot end.
        """
        actors, self._actors = self._actors, []
        if not ray.is_initialized():
            return  # everything ended with it; some of Ray's functions would start a new one
        for actor in () if self._head.is_gone else actors:
            with _logged("end a worker"):
                ray.kill(actor, no_restart=True)
        self._give_place_back()
        with _logged("look for workers that outlived their end"):
            if self._head.is_gone:
                end_leftovers(self._placements, everywhere=False, patience_seconds=0.0)
            else:
                end_leftovers(self._placements, everywhere=silent, patience_seconds=5.0)

    def _give_place_back(self) -> None:
        place, self._placement_group = self._placement_group, None
        if place is not None and not self._head.is_gone:  # else Ray waits for a head, and then aborts this process
            with _logged("give the workers' place back"):
                remove_placement_group(place)


@contextlib.contextmanager
def _logged(action: str) -> Iterator[None]:
    """Log a failure of the block instead of raising it."""
    try:
        yield
    except Exception as error:
        _log.warning("could not %s: %s", action, error)
