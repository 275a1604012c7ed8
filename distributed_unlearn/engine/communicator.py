"""One torch.distributed group of all ranks: rendezvous, the collectives that curvature needs, their volume.

World size 1 goes through the same calls on a group of one, so there is one code path.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

Part = TypeVar("Part")


@dataclass(frozen=True)
class RankSpec:
    """A rank's place in the group and on its node, as the driver assigned it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device_index: int = 0
    """Which of the GPUs that this process sees is its own; without meaning on a CPU."""
    shares_device: bool = False
    """Whether other ranks may be on the same GPU: NCCL refuses that, so collectives go through the hosts."""


class Communicator:
    """Collectives of one process group; counts the floats that they move (received by each rank).

    Results are where the arguments were. Gloo has no gather of GPU tensors, so where it serves GPUs (`shares_device`)
    the arguments go through the host.
    """

    def __init__(self, spec: RankSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self._transport = torch.device("cpu") if spec.shares_device else device
        self.num_elements_moved = 0

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        return self.spec.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.spec.world_size

    def all_gather(self, local: torch.Tensor) -> torch.Tensor:
        """[n] on every rank -> [world_size * n], in rank order. All ranks must call this."""
        sent = local.contiguous().to(self._transport)
        full = sent.new_empty(local.numel() * self.world_size)
        dist.all_gather_into_tensor(full, sent)
        self.num_elements_moved += full.numel()
        return full.to(local.device)

    def reduce_scatter(self, full: torch.Tensor) -> torch.Tensor:
        """[world_size * n] -> this rank's [n] of the sum over ranks. All ranks must call this."""
        sent = full.contiguous().to(self._transport)
        local = sent.new_empty(full.numel() // self.world_size)
        dist.reduce_scatter_tensor(local, sent)
        self.num_elements_moved += full.numel()
        return local.to(full.device)

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, a new tensor. All ranks must call this."""
        total = values.to(self._transport, copy=True)
        dist.all_reduce(total)
        return total.to(self.device)

    def all_reduce_max(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum over ranks, a new tensor. All ranks must call this."""
        total = values.to(self._transport, copy=True)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return total.to(self.device)

    def all_true(self, condition: bool) -> bool:
        """Whether `condition` holds on every rank. All ranks must call this."""
        return bool(self.all_reduce_max(torch.tensor([0.0 if condition else 1.0])).item() == 0.0)

    def gather_objects(self, value: object) -> list[object]:
        """`value` of every rank in rank order, on every rank; small objects only. All ranks must call this."""
        found: list[object] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def gather_parts(self, parts: list[Part]) -> list[Part]:
        """Every rank's parts in rank order, on every rank; small objects only. All ranks must call this."""
        return [part for of_rank in self.gather_objects(parts) for part in of_rank]  # type: ignore[attr-defined]

    def barrier(self) -> None:
        """Wait for all ranks; what they wrote before it is there afterwards. All ranks must call this."""
        # Reading the result is what makes the host wait: NCCL's collectives only order the device's stream.
        self.all_reduce_sum(torch.zeros(1)).item()


def open_store(host: str, timeout_seconds: float) -> tuple[dist.TCPStore, int]:
    """Rank 0's rendezvous store on a port that the system picks (no port is chosen, freed and raced for)."""
    # A socket of ours: the store has no authentication, and by itself would listen on all interfaces.
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    store = dist.TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
        master_listen_fd=listener.detach(),
    )
    return store, store.port


def _interface_towards(host: str) -> str | None:
    """The network interface from which this machine reaches `host`; where `host` is here, the one that owns it."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # UDP: looks the route up and sends nothing
            own = str(probe.getsockname()[0])
    except OSError:
        return None  # no route: joining the store will say so
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            found = str(address.address).partition("%")[0]  # an IPv6 address may carry its scope
            # A host name may stand for 127.0.1.1, which no interface lists.
            if found == own or (own.startswith("127.") and found.startswith("127.")):
                return name
    return None


def _choose_interface(backend: str, host: str) -> None:
    """Let the backend listen on the network that the ranks share.

    Left alone, gloo takes the address that the machine's name stands for, and NCCL the first interface that is up.
    """
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    if not os.environ.get(variable) and (interface := _interface_towards(host)):
        # NCCL takes a name for the beginning of names unless told otherwise.
        os.environ[variable] = f"={interface}" if backend == "nccl" else interface


def connect(
    spec: RankSpec, host: str, port: int, store: dist.Store | None, timeout_seconds: float, use_gpu: bool
) -> Communicator:
    """Join the group: gloo on CPU and on shared GPUs, else NCCL. All ranks must call this.

    Sets RANK, WORLD_SIZE, LOCAL_RANK and the like, which DeepSpeed reads, in this process's environment; also
    GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, unless the user has set it.
    A group that exists already (an in-process worker used twice) is used again.
    """
    local_device = spec.device_index if use_gpu else spec.local_rank
    os.environ.update(
        RANK=str(spec.rank),
        WORLD_SIZE=str(spec.world_size),
        LOCAL_RANK=str(local_device),
        LOCAL_WORLD_SIZE=str(spec.local_world_size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    device = torch.device("cuda", local_device) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        if store is None:
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        backend = "nccl" if use_gpu and not spec.shares_device else "gloo"
        _choose_interface(backend, host)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("unlearn", store),
            rank=spec.rank,
            world_size=spec.world_size,
            timeout=timeout,
        )
    assert dist.get_world_size() == spec.world_size, "the process group that exists has another size"
    return Communicator(spec, device)
