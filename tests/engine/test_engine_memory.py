"""Memory that may still be taken, and what running out of it says."""

from types import SimpleNamespace

import pytest
import torch

from distributed_unlearn.cluster.in_process import InProcessGroup
from distributed_unlearn.config import ClusterConfig, JobConfig
from distributed_unlearn.engine import memory
from distributed_unlearn.engine.communicator import RankSpec
from distributed_unlearn.errors import ResourceError


def fake_rank(device, **spec):
    return SimpleNamespace(device=torch.device(device), spec=RankSpec(0, 4, 0, 2, **spec))


def test_a_gpu_has_free_what_its_allocator_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3500)
    assert memory.free_bytes(fake_rank("cuda")) == 1000 + 1500
    assert memory.free_bytes(fake_rank("cuda", shares_device=True)) == 500 + 1500


def test_ranks_of_a_node_divide_its_memory(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1001))
    assert memory.free_bytes(fake_rank("cpu")) == 500


def test_running_out_of_memory_names_keys_that_exist(monkeypatch):
    group = InProcessGroup(ClusterConfig(backend="in_process", num_workers=1, use_gpu="never"))

    def full(self, check):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved memory is large, try")

    monkeypatch.setattr("distributed_unlearn.engine.worker.Worker.check_curvature", full)
    with pytest.raises(ResourceError, match="Tried to allocate 2.00 GiB") as caught:
        group.call_all("check_curvature", None)
    assert "try" not in caught.value.got
    keys = [word.strip(",") for word in caught.value.remedy.split() if "." in word]
    assert len(keys) == 5
    for key in keys:
        section, name = key.split(".")
        assert name in JobConfig.model_fields[section].annotation.model_fields
