"""The objective on one step's minibatches: loss, gradient and curvature products of this rank's share.

Every method is collective unless it says otherwise: all ranks must call the same methods in the same order.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distributed_unlearn.config import SecondOrderConfig
from distributed_unlearn.curvature.cached_size import KeptBytes, measure_kept
from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.curvature.operators import Product
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.curvature.trace import LossShare
from distributed_unlearn.data.batches import Corpus
from distributed_unlearn.data.sampling import draw, split_roles
from distributed_unlearn.engine.inputs import MicroBatch, Minibatch, NotedLogits, local_micro_batches, minibatch_totals
from distributed_unlearn.engine.memory import free_bytes
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.engine.weights import FormerWeights
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.objectives.constants import LastSeen
from distributed_unlearn.objectives.predictions import MinibatchTotals
from distributed_unlearn.solvers.protocols import LossAndTerms
from distributed_unlearn.workers.messages import RoundSpec


@dataclass(frozen=True)
class MemoryPlan:
    """What the passes of a round keep, decided once, the same on every rank. It changes cost, never a result."""

    cached: bool
    """Whether products keep their graphs."""
    keep_forward: bool
    """Whether a gradient keeps the blocks' graphs from forward to backward."""
    gradient_group: int
    """Micro-batches that go through one gradient pass together."""
    product_group: int
    """The same for a product."""
    cached_bytes: int
    """What cached mode would keep between products; 0 where there are none."""


def plan_memory(
    kept: KeptBytes, budget: float, mode: Literal["auto", "cached", "recompute"], num_gradient: int, num_product: int
) -> MemoryPlan:
    """Choose what is kept, from what one micro-batch of the widest records keeps.

    - Products keep their graphs if those of all their micro-batches fit (`auto`) or because they have to (`cached`).
    - A gradient keeps its blocks' graphs (saving the recomputation, F of 4F) if at most two passes are needed for
      that: it then gathers weights no more often than with recomputation. Never where the mode is `recompute`.
    - Else a pass holds the block inputs of as many micro-batches as fit, at least of one.

    Args:
        kept: bytes of one micro-batch of the widest records, largest rank.
        budget: bytes for what is kept, smallest rank.
        mode: as configured.
        num_gradient: micro-batches of the gradient minibatch on each rank.
        num_product: those of the curvature minibatch; 0 where there are no products.
    """
    together = max(1, int(budget // max(kept.inputs, 1)))
    cached_bytes = kept.cached(num_product) if num_product > 0 else 0
    cached = num_product > 0 and (mode == "cached" or (mode == "auto" and cached_bytes <= budget))
    with_graphs = int(max(budget - kept.weights, 0) // max(kept.forward_graphs, 1))
    if cached:
        with_graphs = max(with_graphs, num_product)  # their graphs are a part of what products keep
    keep_forward = mode != "recompute" and 2 * with_graphs >= num_gradient
    return MemoryPlan(
        cached=cached,
        keep_forward=keep_forward,
        gradient_group=min(with_graphs if keep_forward else together, num_gradient),
        product_group=num_product if cached else min(together, num_product),
        cached_bytes=cached_bytes,
    )


def note_start_logits(opened: OpenedModel, start: SegmentStore, batches: list[MicroBatch]) -> None:
    """Give micro-batches their logits at the weights of `start`: one forward pass. All ranks must call this."""
    noted = [NotedLogits() for _ in batches]
    pairs = list(zip(batches, noted, strict=True))
    shares = [LossShare(micro.batch.inputs, note, micro.batch.positions) for micro, note in pairs]
    Linearisation(opened.segmented, start, shares).loss()
    for micro, note in pairs:
        micro.loss.start_logits = note.logits


class MinibatchObjective:
    """A round's objective at the current weights, on the minibatches of the step that `draw` has begun.

    A step has two minibatches: the gradient's, on which losses are measured too, and its head, the curvature's. All
    micro-batches of one go through the model together, so that a segment's weights are gathered once a pass; where
    that would keep more than the memory budget, they go in groups.
    Vectors are flat shards, [vector_numel] in the master's dtype.
    """

    def __init__(self, opened: OpenedModel, corpus: Corpus, spec: RoundSpec) -> None:
        self._opened, self._corpus, self._spec = opened, corpus, spec
        self._objective = build_objective(spec.objective, spec.holdout_loss, spec.solver.seed)
        needs = [needs for needs in (self._objective.forget_needs, self._objective.retain_needs) if needs is not None]
        self._start: SegmentStore | None = None
        if any(need.start_logits for need in needs):
            former = FormerWeights(opened.weights, opened.store.compute_dtype)
            self._start = SegmentStore(opened.layout, opened.communicator, former, opened.store.compute_dtype)
        follows = spec.objective.order == "refreshed" and self._objective.forget_needs is not None
        self.last_seen = LastSeen(spec.constants) if follows else None
        """Where targets follow the ranks of log-odds last seen; part of what a round that is taken up again needs."""
        self._constants = spec.constants
        self._gradient_batches: list[MicroBatch] = []
        self._forget_batches: list[MicroBatch] = []
        """The first of them, where they were drawn by role."""
        self._curvature_minibatch: Minibatch | None = None
        self._curvature_batches: list[MicroBatch] | None = None
        self._linearisations: list[Linearisation] = []
        self.has_own_curvature_minibatch = False
        """Whether the step's curvature minibatch is only a part of its gradient minibatch."""
        self.memory: MemoryPlan | None = None
        """What passes keep; decided at the first of them."""

    def draw(self, step_index: int, by_role: bool = False) -> None:
        """Draw the step's minibatches; the graphs of the step before are dropped. Not collective.

        With `by_role` no micro-batch of the gradient minibatch mixes forget and retain records.
        """
        self._linearisations = []
        solver, minibatch = self._spec.solver, self._drawn(step_index)
        if self.last_seen is not None:
            self._constants = self.last_seen.constants()
        if by_role:
            totals, none = minibatch_totals(self._corpus, minibatch), minibatch.forget[:0]
            self._forget_batches = self._micro_batches(Minibatch(minibatch.forget, none), totals)
            self._gradient_batches = [
                *self._forget_batches,
                *self._micro_batches(Minibatch(none, minibatch.retain), totals),
            ]
        else:
            self._forget_batches, self._gradient_batches = [], self._micro_batches(minibatch)
        self._curvature_batches = None
        self._curvature_minibatch = minibatch
        if isinstance(solver, SecondOrderConfig):
            self._curvature_minibatch = minibatch.head(*self._roles(solver.curvature_batch))
        self.has_own_curvature_minibatch = len(self._curvature_minibatch) < len(minibatch)

    def _drawn(self, step_index: int) -> Minibatch:
        """The records of the step's gradient minibatch; not collective."""
        spec, solver, objective = self._spec, self._spec.solver, self._objective
        at = solver.draws_at(step_index)
        num_forget, num_retain = split_roles(
            solver.gradient_batch,
            objective.forget_needs is not None and at.forget is not None,
            objective.retain_needs is not None and at.retain is not None,
        )
        return Minibatch(
            draw(solver.seed, spec.round_index, at.forget or 0, "forget", spec.forget, num_forget),
            draw(solver.seed, spec.round_index, at.retain or 0, "retain", spec.retain, num_retain),
        )

    def gradient(self, gradient: Tensor, exact_loss: bool, forget_part: Tensor | None = None) -> LossAndTerms:
        """Add the gradient to `gradient`; the loss comes with it. All ranks must call this.

        With `exact_loss` the loss is that of `loss`: what trials are compared with must be as exact as they are. The
        forget records' part is added to `forget_part` as well, where the minibatch was drawn by role.
        """
        memory, local = self._decided(), torch.zeros((), dtype=torch.float64)
        self._note_start(self._gradient_batches, memory.gradient_group)
        if forget_part is not None:
            for group in _groups(self._forget_batches, memory.gradient_group):
                local += self._linearise(group, keep_forward=memory.keep_forward).gradient(forget_part).cpu()
            gradient.add_(forget_part)
        remaining = self._gradient_batches[0 if forget_part is None else len(self._forget_batches) :]
        for group in _groups(remaining, memory.gradient_group):
            local += self._linearise(group, keep_forward=memory.keep_forward).gradient(gradient).cpu()
        self._note_log_odds()
        if exact_loss and self._opened.master_store is not self._opened.store:
            local = self._local_loss(self._gradient_batches)
        names = sorted(self._gradient_batches[0].loss.terms)
        sums = [sum(float(batch.loss.terms[name]) for batch in self._gradient_batches) for name in names]
        total = self._opened.communicator.all_reduce_sum(torch.tensor([float(local), *sums], dtype=torch.float64))
        return LossAndTerms(float(total[0]), {name: float(value) for name, value in zip(names, total[1:], strict=True)})

    def product(self, vector: Tensor) -> Tensor:
        """`H v` or `G v` on the curvature minibatch, a new vector. All ranks must call this."""
        self._prepare_products()
        result = torch.zeros_like(vector)
        for linearisation in self._linearisations:
            linearisation.product(vector, result)
        return result

    def product_and_gradient(self, vector: Tensor, gradient: Tensor) -> tuple[Tensor, float]:
        """The first product of a step, with the curvature minibatch's gradient and loss, which are its by-products.

        Adds the gradient to `gradient`. The loss is at the master's precision. All ranks must call this.
        """
        self._prepare_products()
        result = torch.zeros_like(vector)
        local = torch.zeros((), dtype=torch.float64)
        for linearisation in self._linearisations:
            local += linearisation.product(vector, result, gradient).cpu()
        if self._opened.master_store is not self._opened.store:
            return result, self.curvature_loss()
        return result, self._sum(local)

    def _prepare_products(self) -> None:
        if not self._linearisations:
            memory = self._decided()
            groups = _groups(self._curvature_micro_batches(), memory.product_group)
            self._note_start(self._curvature_micro_batches(), memory.product_group)
            self._linearisations = [self._linearise(group, cached=memory.cached) for group in groups]

    def _curvature_micro_batches(self) -> list[MicroBatch]:
        if self._curvature_batches is None:
            assert self._curvature_minibatch is not None, "a pass before draw"
            self._curvature_batches = self._micro_batches(self._curvature_minibatch)
        return self._curvature_batches

    def loss(self) -> float:
        """The loss on the gradient minibatch, at the master's precision. All ranks must call this."""
        return self._sum(self._local_loss(self._gradient_batches))

    def curvature_loss(self) -> float:
        """The loss on the curvature minibatch, at the master's precision. All ranks must call this."""
        self._note_start(self._curvature_micro_batches(), self._decided().product_group)
        return self._sum(self._local_loss(self._curvature_micro_batches()))

    def _sum(self, local: Tensor) -> float:
        return float(self._opened.communicator.all_reduce_sum(local.reshape(1))[0])

    def release(self) -> None:
        """Drop the graphs of the products; the next product makes new ones. Not collective."""
        self._linearisations = []

    def _roles(self, size: int) -> tuple[int, int]:
        """How many records of a minibatch are forgotten and how many retained."""
        objective = self._objective
        return split_roles(size, objective.forget_needs is not None, objective.retain_needs is not None)

    def _micro_batches(self, minibatch: Minibatch, totals: MinibatchTotals | None = None) -> list[MicroBatch]:
        communicator = self._opened.communicator
        return local_micro_batches(
            self._corpus,
            minibatch,
            self._objective,
            self._constants,
            communicator.rank,
            communicator.world_size,
            self._spec.curvature.micro_batch_size,
            communicator.device,
            totals,
        )

    def _note_log_odds(self) -> None:
        """Tell every rank the log-odds that the gradient pass came by. All ranks must call this."""
        if self.last_seen is None:
            return
        seen = []
        for micro in self._gradient_batches:
            assert micro.loss.log_odds is not None
            seen.append((micro.records, micro.loss.log_odds.double().cpu().numpy()))
        for of_rank in self._opened.communicator.gather_objects(seen):
            for records, log_odds in of_rank:  # type: ignore[attr-defined]
                self.last_seen.note(records, self._corpus.num_answer_tokens(records), log_odds)

    def _note_start(self, batches: list[MicroBatch], together: int) -> None:
        """Logits at the round's start, once for each micro-batch and where they are read. All ranks must call this."""
        if self._start is not None and batches[0].loss.start_logits is None:
            for group in _groups(batches, max(together, 1)):
                note_start_logits(self._opened, self._start, group)

    def _linearise(
        self, batches: list[MicroBatch], cached: bool = False, keep_forward: bool = False, exact: bool = False
    ) -> Linearisation:
        opened = self._opened
        return Linearisation(
            opened.segmented,
            opened.master_store if exact else opened.store,
            [micro.share for micro in batches],
            self._spec.curvature.product,
            cached=cached,
            keep_forward=keep_forward,
        )

    def _decided(self) -> MemoryPlan:
        """What passes keep, for the whole round. All ranks must call this."""
        if self.memory is None:
            uses_products = isinstance(self._spec.solver, SecondOrderConfig)
            config, communicator = self._spec.curvature, self._opened.communicator
            num_product = len(self._curvature_micro_batches()) if uses_products else 0
            measured = self._measure(config.product if uses_products else None)
            sizes = [measured.weights, measured.graphs, measured.forward_graphs, measured.inputs]
            if config.memory_budget_gib is None:
                budget = free_bytes(communicator) / 2
            else:
                budget = config.memory_budget_gib * 2**30
            largest = communicator.all_reduce_max(torch.tensor([-budget, *sizes], dtype=torch.float64))
            kept = KeptBytes(*(int(size) for size in largest[1:]))
            num_gradient = len(self._gradient_batches)
            self.memory = plan_memory(kept, -float(largest[0]), config.mode, num_gradient, num_product)
        return self.memory

    def _measure(self, product: Product | None) -> KeptBytes:
        """Sizes on a micro-batch of the round's longest records, the same ones on every rank.

        The first step's own micro-batches may be far shorter than those of a later step. All ranks must call this.
        """
        spec, opened = self._spec, self._opened
        widest = Minibatch(np.empty(0, dtype=np.int64), np.concatenate([spec.forget, spec.retain]))
        lengths = self._corpus.lengths(widest.retain)
        size = spec.curvature.micro_batch_size
        longest = widest.retain[np.argsort(-lengths, kind="stable")[:size]]
        [batch] = local_micro_batches(
            self._corpus,
            Minibatch(longest[:0], longest),
            self._objective,
            spec.constants,
            0,
            1,
            size,
            opened.communicator.device,
        )
        self._note_start([batch], 1)
        return measure_kept(opened.segmented, opened.store, batch.share, product)

    def _local_loss(self, batches: list[MicroBatch]) -> Tensor:
        """This rank's share of the loss on a minibatch, at the master's precision.

        A step changes weights by less than bfloat16 resolves: a trial in the compute dtype would see a few per cent
        of it and reject every step.
        """
        memory, local = self._decided(), torch.zeros((), dtype=torch.float64)
        for group in _groups(batches, memory.gradient_group):
            local += self._linearise(group, exact=True).loss().cpu()
        return local


def _groups(batches: list[MicroBatch], size: int) -> list[list[MicroBatch]]:
    return [batches[start : start + size] for start in range(0, len(batches), size)]
