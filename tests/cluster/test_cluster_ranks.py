"""Ranks are assigned without a process, and a job that no cluster can place is refused before one is started."""

import pytest

import distributed_unlearn.cluster.worker_group as worker_group
from distributed_unlearn.cluster.actor import Placement
from distributed_unlearn.cluster.worker_group import assign_ranks, check_capacity
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.engine.communicator import RankSpec
from distributed_unlearn.errors import ResourceError


def _placed(*places: tuple[str, tuple[int, ...]]) -> list[Placement]:
    return [Placement(node, gpus, "10.0.0.1", 100 + i) for i, (node, gpus) in enumerate(places)]


TABLE = {
    "one": ([("a", ())], [(0, 0, 1)]),
    "two on a node, without GPUs, stay in order": ([("a", ()), ("a", ())], [(0, 0, 2), (1, 1, 2)]),
    "by node, not by order of creation": (
        [("b", (0,)), ("a", (0,)), ("b", (1,)), ("a", (1,))],
        [(2, 0, 2), (0, 0, 2), (3, 1, 2), (1, 1, 2)],
    ),
    "by lowest GPU within a node": ([("a", (3,)), ("a", (0,)), ("a", (10,))], [(1, 1, 3), (0, 0, 3), (2, 2, 3)]),
    "nodes of different size": ([("a", (0,)), ("b", (0,)), ("a", (1,))], [(0, 0, 2), (2, 0, 1), (1, 1, 2)]),
}


@pytest.mark.parametrize("name", TABLE)
def test_assign_ranks(name):
    places, expected = TABLE[name]
    specs = assign_ranks(_placed(*places))
    assert specs == [RankSpec(rank, len(places), local, on_node) for rank, local, on_node in expected]


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


def test_a_cluster_without_processors(monkeypatch):
    _cluster(monkeypatch, memory=1.0)
    with pytest.raises(ResourceError, match="at most 0 workers"):
        check_capacity(ClusterConfig(num_workers=1))
