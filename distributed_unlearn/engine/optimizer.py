"""AdamW and SGD on the flat fp32 shards: torch's optimisers on one vector a rank."""

from typing import Literal

import torch
from torch import Tensor

from distributed_unlearn.curvature.layout import shard_of
from distributed_unlearn.engine.model import OpenedModel


def decay_mask(opened: OpenedModel) -> Tensor:
    """Which entries of this rank's weights decay, as 0.0 and 1.0: [vector_numel], in the master's dtype.

    Matrices do; vectors (norms, biases), the frozen row of an embedding and padding do not. All ranks get their own.
    """
    weights = opened.weights.master
    mask = torch.zeros_like(weights)
    for segment in opened.layout.segments:
        for slot in segment.trainable:
            if len(slot.shape) < 2:
                continue
            full = torch.ones(slot.shape, dtype=torch.bool)
            if slot.frozen_row is not None:
                full[slot.frozen_row] = False
            begin = segment.start + slot.offset
            local = shard_of(full, slot, opened.communicator.rank, weights.dtype)
            mask[begin : begin + slot.shard_numel] = local.to(weights.device)
    return mask


class ShardedOptimizer:
    """One optimiser over the master shards; its state is partitioned as they are.

    Weight decay is decoupled for AdamW, `w -= lr * weight_decay * w` (Loshchilov and Hutter 2019), and part of the
    gradient for SGD, as in torch; in both it spares what `decay_mask` spares.
    """

    def __init__(self, opened: OpenedModel, method: Literal["adamw", "sgd"], weight_decay: float) -> None:
        self._opened, self._method, self._weight_decay = opened, method, weight_decay
        # The parameter shares the master's memory.
        self._parameter = torch.nn.Parameter(opened.weights.master, requires_grad=True)
        kind = torch.optim.AdamW if method == "adamw" else torch.optim.SGD
        # The rate is set at every step, the decay done here.
        self._optimizer = kind([self._parameter], lr=0.0, weight_decay=0.0)
        self._mask = decay_mask(opened) if weight_decay > 0.0 else None

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """Change the weights; `gradient` [vector_numel] may be changed too. All ranks must call this."""
        weights = self._opened.weights
        if self._mask is not None and self._method == "adamw":
            weights.master.addcmul_(weights.master, self._mask, value=-learning_rate * self._weight_decay)
        elif self._mask is not None:
            gradient.addcmul_(weights.master, self._mask, value=self._weight_decay)
        self._parameter.grad = gradient
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self._parameter.grad = None
        weights.refresh()
