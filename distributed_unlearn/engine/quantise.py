"""Round-to-nearest quantisation of the opened weights, as a stress: does what was forgotten come back?"""

import torch
from torch import Tensor, nn

from distributed_unlearn.curvature.layout import Slot, shard_of
from distributed_unlearn.engine.model import OpenedModel


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Rows in groups of `group_size` neighbours, each group on a grid of `2^bits` levels from its least to its most.

    `w' = low + round((w - low) / step) step`, `step = (high - low) / (2^bits - 1)`: asymmetric, without calibration,
    the simplest of what 4-bit formats do. The last group of a row may be shorter.

    Args:
        weight: [rows, columns] or more dimensions, all but the first counted as columns.
        bits: Of a weight.
        group_size: Weights that share a scale.
    """
    rows = weight.reshape(len(weight), -1)
    width = rows.shape[1]
    missing = -width % group_size
    # The last value of a row repeated changes neither the least nor the most of its group.
    padded = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1).reshape(len(rows), -1, group_size)
    low, high = padded.amin(-1, keepdim=True), padded.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    safe = torch.where(step > 0, step, 1)
    rounded = low + ((padded - low) / safe).round() * safe
    return rounded.reshape(len(rows), -1)[:, :width].reshape(weight.shape)


def quantise(opened: OpenedModel, bits: int, group_size: int) -> int:
    """Round the trainable matrices outside the embeddings in place; returns how many weights. All ranks must call this.

    Input and output embeddings, norms and biases stay, as in the common formats. Groups are those of whole rows,
    gathered one matrix at a time: the result does not depend on how the weights are partitioned.
    """
    weights, rank, count = opened.weights, opened.communicator.rank, 0
    kept = _embeddings(opened.model)
    for segment in opened.layout.segments:
        for slot in segment.trainable:
            if not _is_rounded(slot, kept):
                continue
            full = round_to_nearest(weights.gather_parameter(segment, slot), bits, group_size)
            begin = segment.start + slot.offset
            weights.master[begin : begin + slot.shard_numel] = shard_of(full, slot, rank, weights.master.dtype)
            count += slot.numel
    weights.refresh()
    return count


def _is_rounded(slot: Slot, kept: frozenset[str]) -> bool:
    return len(slot.shape) > 1 and slot.qualified_name not in kept


def _embeddings(model: nn.Module) -> frozenset[str]:
    """Names of the weights of all embeddings and of the output embedding."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    weights = {id(parameter) for module in modules for parameter in module.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in weights)
