"""The objective on one step's minibatches: loss, gradient and curvature products of this rank's share.

Every method is collective unless it says otherwise: all ranks must call the same methods in the same order.
"""

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.data.batches import Corpus
from distributed_unlearn.data.sampling import draw
from distributed_unlearn.engine.inputs import MicroBatch, Minibatch, local_micro_batches
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.workers.messages import RoundSpec


@dataclass(frozen=True)
class LossAndTerms:
    """The objective on the whole minibatch, the same on every rank."""

    loss: float
    terms: dict[str, float]
    """The objective's parts by name; their sum need not be the loss."""


class MinibatchObjective:
    """A round's objective at the current weights, on the minibatches of the step that `draw` has begun.

    A step has two minibatches: the gradient's, on which losses are measured too, and its head, the curvature's.
    Vectors are flat shards, [vector_numel] in the master's dtype.
    """

    def __init__(self, opened: OpenedModel, corpus: Corpus, spec: RoundSpec) -> None:
        self._opened, self._corpus, self._spec = opened, corpus, spec
        self._objective = build_objective(spec.objective, spec.holdout_loss)
        self._gradient_batches: list[MicroBatch] = []
        self._curvature_minibatch: Minibatch | None = None
        self._linearisations: list[Linearisation] = []
        self.cached: bool | None = None
        """Whether products keep their graphs; decided at the first product."""
        self.cached_bytes = 0
        """What cached mode would keep (measured on one micro-batch, scaled), largest rank."""

    def draw(self, step_index: int) -> None:
        """Draw the step's minibatches; the graphs of the step before are dropped. Not collective."""
        self._linearisations = []
        solver, spec = self._spec.solver, self._spec
        num_forget, num_retain = self._roles(solver.gradient_batch)
        minibatch = Minibatch(
            draw(solver.seed, spec.round_index, step_index, "forget", spec.forget, num_forget),
            draw(solver.seed, spec.round_index, step_index, "retain", spec.retain, num_retain),
        )
        self._gradient_batches = self._micro_batches(minibatch)
        self._curvature_minibatch = minibatch.head(*self._roles(solver.curvature_batch))

    def gradient(self, gradient: Tensor, exact_loss: bool) -> LossAndTerms:
        """Add the gradient to `gradient`; the loss comes with it. All ranks must call this.

        With `exact_loss` the loss is that of `loss`: what trials are compared with must be as exact as they are.
        """
        local = torch.zeros((), dtype=torch.float64)
        # Keeping the blocks' graphs from forward to backward is safe once cached mode is known to fit: a gradient's
        # graph is a part of what a product keeps.
        keep = self._spec.curvature.mode == "cached" or self.cached is True
        for linearisation in self._linearise(self._gradient_batches, cached=False, keep_forward=keep):
            local += linearisation.gradient(gradient).double().cpu()
        if exact_loss and self._opened.exact_store is not self._opened.store:
            local = self._local_loss()
        names = sorted(self._gradient_batches[0].loss.terms)
        sums = [sum(float(batch.loss.terms[name]) for batch in self._gradient_batches) for name in names]
        total = self._opened.communicator.all_reduce_sum(torch.tensor([float(local), *sums], dtype=torch.float64))
        return LossAndTerms(float(total[0]), {name: float(value) for name, value in zip(names, total[1:], strict=True)})

    def product(self, vector: Tensor) -> Tensor:
        """`H v` or `G v` on the curvature minibatch, a new vector. All ranks must call this."""
        if not self._linearisations:
            assert self._curvature_minibatch is not None, "a product before draw"
            batches = self._micro_batches(self._curvature_minibatch)
            if self.cached is None:
                self.cached = self._choose_mode(batches)
            self._linearisations = self._linearise(batches, self.cached)
        result = torch.zeros_like(vector)
        for linearisation in self._linearisations:
            linearisation.product(vector, result)
        return result

    def loss(self) -> float:
        """The loss on the gradient minibatch, at the master's precision. All ranks must call this."""
        return float(self._opened.communicator.all_reduce_sum(self._local_loss().reshape(1))[0])

    def release(self) -> None:
        """Drop the graphs of the products; the next product makes new ones. Not collective."""
        self._linearisations = []

    def _roles(self, size: int) -> tuple[int, int]:
        """How many records of a minibatch are forgotten and how many retained."""
        objective = self._objective
        if objective.uses_forget and objective.uses_retain:
            return max(1, size // 2), max(1, size - size // 2)
        return (size, 0) if objective.uses_forget else (0, size)

    def _micro_batches(self, minibatch: Minibatch) -> list[MicroBatch]:
        communicator = self._opened.communicator
        return local_micro_batches(
            self._corpus,
            minibatch,
            self._objective,
            self._spec.reference_nll,
            communicator.rank,
            communicator.world_size,
            self._spec.curvature.micro_batch_size,
            communicator.device,
        )

    def _linearise(
        self, batches: list[MicroBatch], cached: bool, keep_forward: bool = False, exact: bool = False
    ) -> list[Linearisation]:
        opened, product = self._opened, self._spec.curvature.product
        store = opened.exact_store if exact else opened.store
        return [
            Linearisation(
                opened.segmented,
                store,
                micro.batch.inputs,
                micro.loss,
                product,
                cached=cached,
                keep_forward=keep_forward,
                positions=micro.batch.positions,
            )
            for micro in batches
        ]

    def _choose_mode(self, batches: list[MicroBatch]) -> bool:
        """Cached or recompute, the same on every rank; measures one micro-batch when the mode is `auto`."""
        config, communicator = self._spec.curvature, self._opened.communicator
        if config.mode != "auto":
            return config.mode == "cached"
        [first] = self._linearise(batches[:1], cached=False)
        kept = first.measure_cached_bytes() * len(batches)
        self.cached_bytes = int(communicator.all_reduce_max(torch.tensor([float(kept)]))[0])
        if config.memory_budget_gib is not None:
            budget = config.memory_budget_gib * 2**30
        elif communicator.device.type == "cuda":
            budget = torch.cuda.mem_get_info()[0] / 2
        else:
            budget = psutil.virtual_memory().available / communicator.spec.local_world_size / 2
        return communicator.all_true(self.cached_bytes <= budget)

    def _local_loss(self) -> Tensor:
        """This rank's share of the loss on the gradient minibatch, at the master's precision.

        A step changes weights by less than bfloat16 resolves: a trial in the compute dtype would see a few per cent
        of it and reject every step.
        """
        local = torch.zeros((), dtype=torch.float64)
        for linearisation in self._linearise(self._gradient_batches, cached=False, exact=True):
            local += linearisation.loss().double().cpu()
        return local
