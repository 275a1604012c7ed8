"""Ranks are assigned without a process; a cluster without room is refused, or waited for, before one is started."""

from types import SimpleNamespace

import pytest

import distributed_unlearn.cluster.worker_group as worker_group
from distributed_unlearn.cluster.actor import Placement, device_index
from distributed_unlearn.cluster.in_process import InProcessGroup
from distributed_unlearn.cluster.worker_group import RayWorkerGroup, assign_ranks, check_capacity
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.errors import ResourceError


def _placed(*places: tuple[str, tuple[str, ...]]) -> list[Placement]:
    return [Placement(node, gpus, "10.0.0.1", 100 + i) for i, (node, gpus) in enumerate(places)]


TABLE = {
    "one": ([("a", ())], [(0, 0, 1)]),
    "two on a node, without GPUs, stay in order": ([("a", ()), ("a", ())], [(0, 0, 2), (1, 1, 2)]),
    "by node, not by order of creation": (
        [("b", ("0",)), ("a", ("0",)), ("b", ("1",)), ("a", ("1",))],
        [(2, 0, 2), (0, 0, 2), (3, 1, 2), (1, 1, 2)],
    ),
    "by lowest GPU within a node": ([("a", ("3",)), ("a", ("0",)), ("a", ("10",))], [(1, 1, 3), (0, 0, 3), (2, 2, 3)]),
    "names of GPUs after numbers": (
        [("a", ("MIG-b",)), ("a", ("MIG-a",)), ("a", ("2",)), ("a", ("10",))],
        [(3, 3, 4), (2, 2, 4), (0, 0, 4), (1, 1, 4)],
    ),
    "several GPUs": ([("a", ("2", "3")), ("a", ("0", "1")), ("a", ("0",))], [(2, 2, 3), (1, 1, 3), (0, 0, 3)]),
    "nodes of different size": ([("a", ("0",)), ("b", ("0",)), ("a", ("1",))], [(0, 0, 2), (2, 0, 1), (1, 1, 2)]),
}


@pytest.mark.parametrize("name", TABLE)
def test_assign_ranks(name):
    places, expected = TABLE[name]
    specs = assign_ranks(_placed(*places))
    assert [(spec.rank, spec.local_rank, spec.local_world_size) for spec in specs] == expected
    assert {spec.world_size for spec in specs} == {len(places)}


def test_ranks_know_their_device_and_whether_any_two_share_one():
    apart = [Placement("a", (gpu,), "10.0.0.1", 100, index) for gpu, index in (("3", 0), ("1", 5))]
    assert [(spec.device_index, spec.shares_device) for spec in assign_ranks(apart)] == [(0, False), (5, False)]
    assert all(spec.shares_device for spec in assign_ranks([*apart, Placement("a", ("3",), "10.0.0.1", 101, 0)]))
    assert not any(spec.shares_device for spec in assign_ranks([*apart, Placement("b", ("3",), "10.0.0.2", 101, 0)]))
    assert not any(spec.shares_device for spec in assign_ranks([Placement("a", (), "10.0.0.1", 1)] * 2))


@pytest.mark.parametrize(
    ("gpu_ids", "visible", "index"),
    [
        (("2",), "2", 0),  # Ray shows a process its own GPU only
        (("2",), "0,2,5", 1),  # or is told to leave the variable alone
        (("2",), None, 2),
        (("2",), "", 2),
        (("MIG-b",), "MIG-a,MIG-b", 1),
        ((), None, 0),
    ],
)
def test_the_device_is_the_one_that_ray_gave(gpu_ids, visible, index):
    assert device_index(gpu_ids, visible) == index


def _cluster(monkeypatch: pytest.MonkeyPatch, **resources: float) -> None:
    monkeypatch.setattr(worker_group.ray, "cluster_resources", lambda: resources)


def test_too_few_processors(monkeypatch):
    _cluster(monkeypatch, CPU=7.0)
    check_capacity(ClusterConfig(num_workers=3, cpus_per_worker=2))
    with pytest.raises(ResourceError, match="4 workers of 2 CPU on a cluster with 7 CPU.*at most 3 workers") as caught:
        check_capacity(ClusterConfig(num_workers=4, cpus_per_worker=2))
    assert caught.value.exit_code == 6


def test_too_few_gpus(monkeypatch):
    _cluster(monkeypatch, CPU=64.0, GPU=2.0)
    check_capacity(ClusterConfig(num_workers=2))
    with pytest.raises(ResourceError, match="3 workers of 1 GPU.*at most 2 workers.*use_gpu to never"):
        check_capacity(ClusterConfig(num_workers=3))
    check_capacity(ClusterConfig(num_workers=3, use_gpu="never"))
    _cluster(monkeypatch, CPU=64.0)
    check_capacity(ClusterConfig(num_workers=3))  # no GPU anywhere: on CPUs
    with pytest.raises(ResourceError, match="3 workers of 1 GPU on a cluster with 0 GPU"):
        check_capacity(ClusterConfig(num_workers=3, use_gpu="always"))


def test_a_gpu_that_is_demanded_is_not_replaced_by_this_process(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ResourceError, match="finds no GPU"):
        InProcessGroup(ClusterConfig(backend="in_process", num_workers=1, use_gpu="always"))


def test_a_cluster_without_processors(monkeypatch):
    _cluster(monkeypatch, memory=1.0)
    with pytest.raises(ResourceError, match="at most 0 workers"):
        check_capacity(ClusterConfig(num_workers=1))


class _Place:
    """A reservation that the clock of `_Growing` fulfils once the cluster has room for it."""

    def __init__(self, cluster: "_Growing", bundles: list[dict[str, float]]) -> None:
        self.cluster, self.bundles = cluster, bundles

    def wait(self, seconds: float) -> bool:
        assert int(seconds) == seconds > 0, "Ray cuts fractions off, and this would not wait at all"
        if not self._fits():
            self.cluster.now += seconds
        return self._fits()

    def _fits(self) -> bool:
        total = self.cluster.resources()
        return all(sum(b[kind] for b in self.bundles) <= total.get(kind, 0) for kind in self.bundles[0])


class _Growing:
    """A cluster whose resources change with time: {seconds: resources from then on}."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, course: dict[float, dict[str, float]]) -> None:
        self.now, self.course = 0.0, course
        self.places: list[_Place] = []
        self.removed: list[_Place] = []
        self.started: list[tuple[dict[str, float], _Place]] = []
        monkeypatch.setattr(worker_group.ray, "cluster_resources", self.resources)
        monkeypatch.setattr(worker_group.ray, "is_initialized", lambda: True)
        head = SimpleNamespace(gcs_address="10.0.0.1:6379")
        monkeypatch.setattr(worker_group.ray, "get_runtime_context", lambda: head)
        monkeypatch.setattr(worker_group, "placement_group", self._reserve)
        monkeypatch.setattr(worker_group, "remove_placement_group", self.removed.append)
        monkeypatch.setattr(worker_group, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(RayWorkerGroup, "_start", lambda _, bundle, place: self.started.append((bundle, place)))

    def resources(self) -> dict[str, float]:
        return self.course[max(time for time in self.course if time <= self.now)]

    def _reserve(self, bundles: list[dict[str, float]], strategy: str) -> _Place:
        self.places.append(_Place(self, bundles))
        return self.places[-1]


def test_a_given_cluster_may_grow(monkeypatch, caplog):
    """The reservation is there from the start, because an autoscaler looks at nothing else."""
    cluster = _Growing(monkeypatch, {0.0: {"CPU": 1.0}, 100.0: {"CPU": 2.0}, 300.0: {"CPU": 4.0}})
    RayWorkerGroup(ClusterConfig(num_workers=4, address="10.0.0.1:6379"))
    assert len(cluster.places) == 1 and cluster.removed == [] and 300 <= cluster.now <= 310
    assert cluster.started == [({"CPU": 1.0}, cluster.places[0])]
    assert caplog.messages == ["waiting up to 600 s for room for 4 workers of 1 CPU"]


def test_gpus_that_join_later_are_used(monkeypatch):
    cluster = _Growing(
        monkeypatch, {0.0: {"CPU": 1.0}, 50.0: {"CPU": 8.0, "GPU": 1.0}, 90.0: {"CPU": 16.0, "GPU": 2.0}}
    )
    RayWorkerGroup(ClusterConfig(num_workers=2, address="auto"))
    assert cluster.started == [({"CPU": 1.0, "GPU": 1.0}, cluster.places[1])]
    assert cluster.removed == [cluster.places[0]] and 90 <= cluster.now <= 100


def test_a_given_cluster_is_waited_for_no_longer_than_agreed(monkeypatch):
    cluster = _Growing(monkeypatch, {0.0: {"CPU": 1.0}})
    with pytest.raises(ResourceError, match="4 workers of 1 CPU on a cluster with 1 CPU.*at most 1 workers"):
        RayWorkerGroup(ClusterConfig(num_workers=4, address="10.0.0.1:6379", placement_timeout_seconds=60.0))
    assert 60 <= cluster.now <= 62 and cluster.removed == cluster.places and cluster.started == []


def test_a_local_ray_refuses_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")  # as if unset
    cluster = _Growing(monkeypatch, {0.0: {"CPU": 1.0}})
    with pytest.raises(ResourceError, match="at most 1 workers"):
        RayWorkerGroup(ClusterConfig(num_workers=4))
    assert cluster.now == 0 and cluster.places == []


def test_nothing_waits_where_there_is_room(monkeypatch, caplog):
    cluster = _Growing(monkeypatch, {0.0: {"CPU": 2.0}})
    RayWorkerGroup(ClusterConfig(num_workers=2))
    assert cluster.now == 0 and len(cluster.started) == 1 and caplog.messages == []
