"""N rank actors in one placement group, driven as one: every call goes to all, the first failure ends all."""

import os
import signal
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distributed_unlearn.cluster.actor import Placement, RankActor
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.engine.communicator import RankSpec
from distributed_unlearn.errors import ResourceError, UserError, WorkerError


def _needs(config: ClusterConfig) -> dict[str, float]:
    bundle: dict[str, float] = {"CPU": float(config.cpus_per_worker)}
    if config.use_gpu == "auto" and ray.cluster_resources().get("GPU", 0) > 0:
        bundle["GPU"] = 1.0
    return bundle


def check_capacity(config: ClusterConfig) -> None:
    """Refuse a job that the cluster can never place.

    Raises:
        ResourceError: fewer CPUs or GPUs in the whole cluster than the workers need.
    """
    bundle, total = _needs(config), ray.cluster_resources()
    for kind, amount in bundle.items():
        if amount * config.num_workers > total.get(kind, 0):
            raise ResourceError(
                f"{config.num_workers} workers of {amount:g} {kind} on a cluster with {total.get(kind, 0):g} {kind}",
                f"at most {int(total.get(kind, 0) // amount)} workers",
                "lower cluster.num_workers, add nodes, or (GPU) set cluster.use_gpu to never",
            )


def assign_ranks(placements: list[Placement]) -> list[RankSpec]:
    """Ranks by node, then lowest GPU, so that a node's ranks are consecutive; aligned with `placements`."""
    order = sorted(range(len(placements)), key=lambda i: (placements[i].node_id, placements[i].gpu_ids, i))
    per_node: dict[str, int] = {}
    specs: dict[int, tuple[int, int]] = {}
    for rank, index in enumerate(order):
        node = placements[index].node_id
        specs[index] = (rank, per_node.get(node, 0))
        per_node[node] = per_node.get(node, 0) + 1
    return [
        RankSpec(specs[i][0], len(placements), specs[i][1], per_node[placement.node_id])
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
        check_capacity(config)
        bundle = _needs(config)
        place = placement_group([bundle] * config.num_workers, strategy="PACK")
        self._placement_group: PlacementGroup | None = place
        try:
            self._start(bundle, place)
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

    def _start(self, bundle: dict[str, float], place: PlacementGroup) -> None:
        config = self._config
        if not place.wait(config.placement_timeout_seconds):
            raise ResourceError(
                f"no room for {config.num_workers} workers within {config.placement_timeout_seconds:g} s",
                "free CPUs or GPUs for all workers at once",
                "wait for other jobs, add nodes, or raise cluster.placement_timeout_seconds",
            )
        actor_class: Any = RankActor  # Ray's decorator adds `options`
        actors = [
            actor_class.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, index),
            ).remote(config.cpus_per_worker)
            for index in range(config.num_workers)
        ]
        self._actors = actors
        placements = self._wait([actor.placement.remote() for actor in actors], "placement")
        specs = assign_ranks(placements)
        by_rank = sorted(range(len(actors)), key=lambda index: specs[index].rank)
        self._actors = [actors[index] for index in by_rank]
        self._placements = [placements[index] for index in by_rank]
        host, timeout = self._placements[0].address, config.collective_timeout_seconds
        port = self.call_rank_zero("open_rendezvous", host, timeout)
        ordered = sorted(specs, key=lambda spec: spec.rank)
        refs = [
            actor.call.remote("connect", spec, host, port, timeout, "GPU" in bundle)
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
        deadline = time.monotonic() + self._config.call_timeout_seconds
        pending, found = list(refs), {}
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._hung(method)
            for ref in ready:
                try:
                    found[ref] = ray.get(ref)
                except (RayTaskError, RayActorError) as error:
                    raise self._failure(*_first_cause(error, ref, refs), method) from None
        return [found[ref] for ref in refs]

    def _failure(self, error: Exception, rank: int, method: str) -> Exception:
        self.shutdown()
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            return cause
        what = "died" if isinstance(error, RayActorError) else "raised an error"
        return WorkerError(
            f"worker {rank}, which {what} during '{method}' ({str(error).strip().splitlines()[-1]})",
            "every worker to finish the call",
            "see the worker's traceback above; nothing was written, so the job can simply be run again",
            worker_traceback=str(error),
        )

    def _hung(self, method: str) -> WorkerError:
        """Ask every actor what it is doing, name the silent ones, end all."""
        states = []
        for rank, actor in enumerate(self._actors):
            try:
                beat = ray.get(actor.heartbeat.remote(), timeout=5)
                states.append(f"rank {rank}: {beat.method or 'idle'} for {beat.running_seconds:.0f} s")
            except (GetTimeoutError, RayActorError):
                states.append(f"rank {rank}: no answer")
        self.shutdown()
        return WorkerError(
            f"a call of '{method}' that took over {self._config.call_timeout_seconds:g} s ({'; '.join(states)})",
            "an answer of every worker in that time",
            "raise cluster.call_timeout_seconds if the call is rightly that long, else look at the silent worker",
        )

    def shutdown(self) -> None:
        """End all workers and give their place back; safe to call twice."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []
        if self._placement_group is not None:
            remove_placement_group(self._placement_group)
            self._placement_group = None
        self._end_leftovers()

    def _end_leftovers(self) -> None:
        """Kill processes of this node that outlived `ray.kill` (a stopped process does; ray issue 52322)."""
        here = ray.get_runtime_context().get_node_id()
        local = [placement.process_id for placement in self._placements if placement.node_id == here]
        deadline = time.monotonic() + 5
        while local and time.monotonic() < deadline:
            local = [pid for pid in local if _is_rank_actor(pid)]
            time.sleep(0.05 if local else 0)
        for pid in local:
            os.kill(pid, signal.SIGKILL)


def _first_cause(error: Exception, ref: Any, refs: list[Any]) -> tuple[Exception, int]:
    """The failure to report, and its rank: peers of a worker that died raise, and may do so before it is missed."""
    if isinstance(error, RayTaskError) and not isinstance(error.cause, UserError):
        for other in ray.wait(refs, num_returns=len(refs), timeout=1.0)[0]:
            try:
                ray.get(other)
            except RayActorError as death:
                return death, refs.index(other)
            except RayTaskError:
                continue
    return error, refs.index(ref)


def _is_rank_actor(process_id: int) -> bool:
    """Whether the process still runs and is one of ours (its id may have been given to another)."""
    try:
        with open(f"/proc/{process_id}/cmdline", "rb") as handle:
            return b"RankActor" in handle.read()
    except OSError:
        return False
