"""Which weights decay: one rule for unlearning and training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_unlearn.curvature.layout import shard_of
from distributed_unlearn.engine.model import OpenedModel


def decays(shape: Sequence[int]) -> bool:
    """Whether a parameter of this (full) shape decays: matrices do, vectors (norms, biases) do not."""
    return len(shape) > 1


def decay_mask(opened: OpenedModel) -> Tensor:
    """Which entries of this rank's weights decay, as 0.0 and 1.0: [vector_numel], in the master's dtype.

    What `decays` says, but for the frozen row of an embedding and padding. All ranks get their own.
    """
    weights = opened.weights.master
    mask = torch.zeros_like(weights)
    for segment in opened.layout.segments:
        for slot in segment.trainable:
            if not decays(slot.shape):
                continue
            full = torch.ones(slot.shape, dtype=torch.bool)
            if slot.frozen_row is not None:
                full[slot.frozen_row] = False
            begin = segment.start + slot.offset
            local = shard_of(full, slot, opened.communicator.rank, weights.dtype)
            mask[begin : begin + slot.shard_numel] = local.to(weights.device)
    return mask
