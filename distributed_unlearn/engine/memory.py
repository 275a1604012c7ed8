"""How much memory a rank may still take, and what running out of it means."""

import psutil
import torch

from distributed_unlearn.engine.communicator import Communicator


def free_bytes(communicator: Communicator) -> int:
    """Memory that this rank could still allocate; not collective.

    On a GPU what the device has free, and what torch's allocator holds without using it: the device counts that as
    taken. On a CPU this rank's part of what the node has available.
    """
    device = communicator.device
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // communicator.spec.local_world_size
