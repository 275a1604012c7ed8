"""Selective synaptic dampening on shards (SSD; Foster, Schoepf, Brintrup 2024, arXiv 2308.07707).

The importance of weight `i` to a set of records is the diagonal of the empirical Fisher matrix,

    F_i = mean over records of (d log p(answer | prompt) / d w_i)^2,

with `log p` summed over the record's predictions. With `F_f` of the forget set and `F` of all data,

    w_i <- min(lambda F_i / F_f,i, 1) w_i    where    F_f,i > alpha F_i,

and every other weight stays as it is, bit for bit.

Gradients are squared record by record. The authors' code squares the gradient of minibatches instead, which is quicker
and another quantity: gradients of a minibatch cancel, so it shrinks with the size of the minibatch, and it would depend
on how records are cut over ranks. Here every rank takes one record at a time.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.curvature.squares import SquaringStore
from distributed_unlearn.curvature.trace import LossShare
from distributed_unlearn.data.batches import Corpus, PredictionBatch
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.errors import NumericalError
from distributed_unlearn.workers.messages import Dampened, DampeningSpec, Indices

Role = Literal["forget", "retain"]


def _log_likelihood(batch: PredictionBatch) -> LossShare:
    """Minus the log-likelihood of the batch's records; its square does not know the sign."""

    def loss(logits: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(wide, batch.labels, reduction="sum")

    return LossShare(batch.inputs, loss, batch.positions)


def dampening_factors(forget: Tensor, everything: Tensor, spec: DampeningSpec) -> Tensor:
    """What every weight is multiplied by: 1 where it is not chosen.

    Args:
        forget: `F_f`, not negative.
        everything: `F`, of the same shape.
        spec: alpha and lambda.
    """
    chosen = forget > spec.selection_weighting * everything
    ratio = spec.dampening_constant * everything / torch.where(chosen, forget, 1.0)
    return torch.where(chosen, ratio.clamp(max=1.0), 1.0)


class Dampening:
    """One round's importances on this rank's shards. All ranks must call every method together."""

    def __init__(self, opened: OpenedModel, corpus: Corpus) -> None:
        self._opened, self._corpus = opened, corpus
        dtype = opened.store.compute_dtype
        self._store = SquaringStore(opened.layout, opened.communicator, opened.weights, dtype)
        master = opened.weights.master
        self._sums: dict[Role, Tensor] = {"forget": torch.zeros_like(master), "retain": torch.zeros_like(master)}

    def add(self, role: Role, indices: Indices) -> None:
        """Add some records' squared gradients to those of their role: one record a rank at a time."""
        communicator = self._opened.communicator
        for start in range(0, len(indices), communicator.world_size):
            # A rank without a record takes part with an empty one, whose gradient is zero.
            mine = indices[start + communicator.rank : start + communicator.rank + 1]
            batch = self._corpus.batch(mine).to(communicator.device)
            share = _log_likelihood(batch)
            Linearisation(self._opened.segmented, self._store, [share], keep_forward=True).gradient(self._sums[role])

    def dampen(self, spec: DampeningSpec) -> Dampened:
        """Change the weights and say how many were.

        Raises:
            NumericalError: an importance that is not finite (on every rank); no weight was changed.
        """
        opened, sums = self._opened, self._sums
        if not opened.communicator.all_true(all(bool(torch.isfinite(found).all()) for found in sums.values())):
            raise NumericalError(
                "a squared gradient that is not finite", "finite gradients", "use float32, and check the records"
            )
        # Of a retain set that was sampled, a record stands for several.
        retain = sums["retain"] * (spec.num_retain / max(spec.num_sampled, 1))
        everything = (sums["forget"] + retain) / (spec.num_forget + spec.num_retain)
        factors = dampening_factors(sums["forget"] / spec.num_forget, everything, spec)
        changed = (factors < 1) & (opened.weights.master != 0)  # a fresh adapter has zeros, which no factor changes
        opened.weights.set_master(opened.weights.master * factors)
        local = torch.stack([changed.sum().double(), (1 - factors)[changed].double().sum()])
        count, total = opened.communicator.all_reduce_sum(local).tolist()
        return Dampened(int(count), total / count if count else None)
