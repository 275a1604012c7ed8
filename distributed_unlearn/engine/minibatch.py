"""The objective on one step's minibatches: loss, gradient and curvature products of this rank's share.

Every method is collective unless it says otherwise: all ranks must call the same methods in the same order.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

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
from distributed_unlearn.engine.inputs import MicroBatch, Minibatch, NotedLogits, local_micro_batches
from distributed_unlearn.engine.memory import free_bytes
from distributed_unlearn.engine.memory_plan import MemoryPlan, plan_memory
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.engine.step_batches import Part, StepBatches, positions_of, share_batches
from distributed_unlearn.engine.weights import FormerWeights
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.objectives.constants import LastSeen
from distributed_unlearn.objectives.predictions import MinibatchTotals
from distributed_unlearn.solvers.protocols import LossAndTerms
from distributed_unlearn.solvers.sampled import SampledChange, estimate_change
from distributed_unlearn.workers.messages import RoundSpec


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

    A step has two minibatches: the gradient's, and its head, the curvature's (see `step_batches`). All micro-batches
    of one go through the model together, so that a segment's weights are gathered once a pass; where that would keep
    more than the memory budget, they go in groups. Cached products keep the graphs that the gradient was computed on.

    Losses are measured as changes since the gradient, at the master's precision: a step changes weights by less than
    bfloat16 resolves, and a trial in the compute dtype would see a few per cent of it and reject every step.
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
        self._drawn: StepBatches | None = None
        self._linearisations: list[Linearisation] = []
        self._records_at_start: Tensor | None = None
        """What each record of the curvature minibatch added to the loss at the gradient's weights."""
        self._records_now: Tensor | None = None
        """What it adds at the weights of the trial, if that was measured already."""
        self._rest_at_start: float | None = None
        """What the rest of the gradient minibatch added; None: not known at the master's precision."""
        self.memory: MemoryPlan | None = None
        """What passes keep; decided at the first of them."""

    @property
    def _batches(self) -> StepBatches:
        assert self._drawn is not None, "a pass before draw"
        return self._drawn

    @property
    def has_own_curvature_minibatch(self) -> bool:
        """Whether the step's curvature minibatch is only a part of its gradient minibatch."""
        return len(self._batches.curvature) < len(self._batches.gradient)

    @property
    def _is_exact(self) -> bool:
        """Whether the compute dtype is the master's."""
        return self._opened.master_store is self._opened.store

    def draw(self, step_index: int, by_role: bool = False) -> None:
        """Draw the step's minibatches; the graphs of the step before are dropped. Not collective.

        With `by_role` no micro-batch of the gradient minibatch mixes forget and retain records.
        """
        self._linearisations = []
        self._records_at_start = self._records_now = self._rest_at_start = None
        solver, minibatch = self._spec.solver, self._records_of(step_index)
        if self.last_seen is not None:
            self._constants = self.last_seen.constants()
        curvature = minibatch
        if isinstance(solver, SecondOrderConfig):
            curvature = minibatch.head(*self._roles(solver.curvature_batch))
        self._drawn = share_batches(self._corpus, minibatch, curvature, by_role, self._micro_batches)

    def _records_of(self, step_index: int) -> Minibatch:
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

    # -- gradient and products ----------------------------------------------------------------------------

    def gradient(
        self,
        gradient: Tensor,
        for_trials: bool,
        forget_part: Tensor | None = None,
        curvature_part: Tensor | None = None,
    ) -> LossAndTerms:
        """See `StepObjective.gradient`; the loss is in the compute dtype. All ranks must call this."""
        memory, batches = self._decided(), self._batches
        self._note_start(batches.gradient_batches, memory.gradient_group)
        keeps = memory.cached and memory.product_group > 0
        apart = curvature_part is not None or (keeps and batches.is_shared)
        compares = for_trials and (batches.is_shared or curvature_part is not None)
        for micro in batches.curvature_batches:
            micro.loss.notes_records = compares and self._is_exact
        rest = local = self._gradient_of(batches.rest_parts, gradient, forget_part)
        if apart:  # after the rest, whose graphs are gone by now
            local = local + self._curvature_gradient(gradient, forget_part, curvature_part, keeps)
        elif batches.is_shared:
            local = local + self._gradient_of(batches.curvature_parts, gradient, forget_part)
        if forget_part is not None:
            gradient.add_(forget_part)
        self._note_log_odds()
        found = self._loss_and_terms(local)
        if compares:
            self._records_at_start = self._gathered_records() if self._is_exact else self._record_losses()
        self._rest_at_start = self._sum(rest) if for_trials and self._is_exact else None
        return found

    def _gradient_of(self, parts: list[Part], gradient: Tensor, forget_part: Tensor | None) -> Tensor:
        """Add the gradient of some micro-batches, whose graphs are dropped; this rank's share of their loss."""
        memory, local = self._decided(), torch.zeros((), dtype=torch.float64)
        for part in parts:
            into = forget_part if part.is_forget and forget_part is not None else gradient
            for group in _groups(part.batches, memory.gradient_group):
                local += self._linearise(group, keep_forward=memory.keep_forward).gradient(into).cpu()
        return local

    def _curvature_gradient(
        self, gradient: Tensor, forget_part: Tensor | None, curvature_part: Tensor | None, keeps: bool
    ) -> Tensor:
        """The same of the curvature minibatch, on graphs that products keep, and times its scale for itself."""
        batches, local = self._batches, torch.zeros((), dtype=torch.float64)
        if not batches.is_shared:
            self._note_start(batches.curvature_batches, self._decided().product_group)
        for part in batches.curvature_parts:
            own = torch.zeros_like(gradient)
            group = self._decided().product_group if keeps else self._decided().gradient_group
            for some in _groups(part.batches, group):
                linearisation = self._linearise(some, cached=keeps, keep_forward=self._decided().keep_forward)
                local += linearisation.gradient(own).cpu()
                if keeps:
                    self._linearisations.append(linearisation)
            if curvature_part is not None:
                curvature_part.add_(own, alpha=batches.scale)
            if batches.is_shared:
                (forget_part if part.is_forget and forget_part is not None else gradient).add_(own)
        return local if batches.is_shared else torch.zeros_like(local)

    def _loss_and_terms(self, local: Tensor) -> LossAndTerms:
        batches = self._batches.gradient_batches
        names = sorted(batches[0].loss.terms)
        sums = [sum(float(micro.loss.terms[name]) for micro in batches) for name in names]
        total = self._opened.communicator.all_reduce_sum(torch.tensor([float(local), *sums], dtype=torch.float64))
        return LossAndTerms(float(total[0]), {name: float(value) for name, value in zip(names, total[1:], strict=True)})

    def product(self, vector: Tensor) -> Tensor:
        """`H v` or `G v` on the curvature minibatch, a new vector. All ranks must call this."""
        batches = self._batches
        if not self._linearisations:
            memory = self._decided()
            self._note_start(batches.curvature_batches, memory.product_group)
            self._linearisations = [
                self._linearise(group, cached=memory.cached)
                for group in _groups(batches.curvature_batches, memory.product_group)
            ]
        result = torch.zeros_like(vector)
        for linearisation in self._linearisations:
            linearisation.product(vector, result)
        return result if batches.scale == 1.0 else result.mul_(batches.scale)

    def release(self) -> None:
        """Drop the graphs of the products; the next product makes new ones. Not collective."""
        self._linearisations = []

    # -- changes of the loss ------------------------------------------------------------------------------

    def sampled_change(self) -> SampledChange:
        """See `StepObjective.sampled_change`. All ranks must call this."""
        assert self._records_at_start is not None, "no losses to compare with were noted"
        batches, self._records_now = self._batches, self._record_losses()
        moved = self._records_now - self._records_at_start
        count = len(batches.curvature.forget)
        parts, sizes = (moved[:count].numpy(), moved[count:].numpy()), [size for _, size in batches.by_role()]
        if batches.is_shared:
            return estimate_change(parts, sizes)
        return SampledChange(float(moved.sum()), None)

    def whole_change(self, at_start: Callable[[], AbstractContextManager[None]]) -> float:
        """See `StepObjective.whole_change`. All ranks must call this."""
        now = self._rest_loss()
        if self._rest_at_start is None:
            with at_start():
                self._rest_at_start = self._rest_loss()
        change = now - self._rest_at_start
        if self._batches.is_shared:
            records, self._records_now = self._records_now, None
            assert self._records_at_start is not None, "no losses to compare with were noted"
            moved = (self._record_losses() if records is None else records) - self._records_at_start
            change += float(moved.sum())
        return change

    def _record_losses(self) -> Tensor:
        """What each record of the curvature minibatch adds now: float64, the same on every rank."""
        batches = self._batches.curvature_batches
        for micro in batches:
            micro.loss.notes_records = True
        self._note_start(batches, self._decided().product_group)
        self._local_loss(batches)
        return self._gathered_records()

    def _gathered_records(self) -> Tensor:
        """[|C|], forget records first, from what the last calls noted; every entry is known to one rank alone."""
        curvature, batches = self._batches.curvature, self._batches.curvature_batches
        within = np.concatenate([curvature.forget, curvature.retain])
        found = torch.zeros(len(within), dtype=torch.float64)
        for micro in batches:
            assert micro.loss.by_record is not None
            found[positions_of(micro.records, within)] = micro.loss.by_record[: len(micro.records)].cpu()
            micro.loss.notes_records = False
        return self._opened.communicator.all_reduce_sum(found.to(self._opened.communicator.device)).cpu()

    def _rest_loss(self) -> float:
        """What the rest of the gradient minibatch adds now."""
        return self._sum(self._local_loss(self._batches.rest_batches))

    def _local_loss(self, batches: list[MicroBatch]) -> Tensor:
        """This rank's share of the loss of some micro-batches, at the master's precision."""
        memory, local = self._decided(), torch.zeros((), dtype=torch.float64)
        for group in _groups(batches, memory.gradient_group):
            local += self._linearise(group, exact=True).loss().cpu()
        return local

    def _sum(self, local: Tensor) -> float:
        return float(self._opened.communicator.all_reduce_sum(local.reshape(1))[0])

    # -- parts --------------------------------------------------------------------------------------------

    def _roles(self, size: int) -> tuple[int, int]:
        """How many records of a minibatch are forgotten and how many retained."""
        objective = self._objective
        return split_roles(size, objective.forget_needs is not None, objective.retain_needs is not None)

    def _micro_batches(self, minibatch: Minibatch, totals: MinibatchTotals) -> list[MicroBatch]:
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
        for micro in self._batches.gradient_batches:
            assert micro.loss.log_odds is not None
            seen.append((micro.records, micro.loss.log_odds.double().cpu().numpy()))
        for records, log_odds in self._opened.communicator.gather_parts(seen):
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
            num_product = len(self._batches.curvature_batches) if uses_products else 0
            measured = self._measure(config.product if uses_products else None)
            sizes = [measured.weights, measured.graphs, measured.forward_graphs, measured.inputs]
            if config.memory_budget_gib is None:
                budget = free_bytes(communicator) / 2
            else:
                budget = config.memory_budget_gib * 2**30
            largest = communicator.all_reduce_max(torch.tensor([-budget, *sizes], dtype=torch.float64))
            kept = KeptBytes(*(int(size) for size in largest[1:]))
            num_gradient = len(self._batches.gradient_batches)
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


def _groups(batches: list[MicroBatch], size: int) -> list[list[MicroBatch]]:
    return [batches[start : start + size] for start in range(0, len(batches), size)]
