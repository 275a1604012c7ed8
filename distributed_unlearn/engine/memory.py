"""How much memory a rank may still take, and what running out of it means."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from distributed_unlearn.engine.communicator import Communicator
from distributed_unlearn.errors import ResourceError


def free_bytes(communicator: Communicator) -> int:
    """Memory that this rank could still allocate; not collective.

    On a GPU what the device has free, and what torch's allocator holds without using it: the device counts that as
    taken. On a CPU this rank's part of what the node has available.
    """
    device = communicator.device
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        sharing = communicator.spec.local_world_size if communicator.spec.shares_device else 1
        return torch.cuda.mem_get_info(device)[0] // sharing + unused
    return psutil.virtual_memory().available // communicator.spec.local_world_size


@contextmanager
def out_of_memory_explained(method: str) -> Iterator[None]:
    """Context in which an allocation that fails becomes an error with a remedy; `method` is what was being done.

    Raises:
        ResourceError: a GPU's memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"a GPU that ran out of memory during '{method}' ({str(error).partition('. If reserved')[0][:300]})",
            "a GPU that holds the weights, the solver's vectors and one block's graph of one micro-batch",
            "lower curvature.micro_batch_size, set curvature.mode to recompute, lower curvature.memory_budget_gib, or "
            "raise cluster.num_workers at cluster.zero_stage 3",
        ) from error
