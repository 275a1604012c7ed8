"""The `StepOracle` on shards: gradients, exact products and tentative updates of one rank.

Every method is collective: all ranks must call the same methods in the same order with the same arguments.
Floats that come back are the same on every rank.
"""

import math
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.data.encoding import EncodedCorpus
from distributed_unlearn.data.sampling import draw
from distributed_unlearn.engine.inputs import MicroBatch, Minibatch, local_micro_batches
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.engine.optimizer import ShardedOptimizer
from distributed_unlearn.objectives.objective import build_objective
from distributed_unlearn.solvers.inner.descent import InnerDescent
from distributed_unlearn.solvers.inner.lanczos import LanczosBasis
from distributed_unlearn.solvers.protocols import InnerDescentEntry, KrylovEntry, StepStart, Trial
from distributed_unlearn.workers.messages import RoundSpec


class ShardedOracle:
    """One round's step oracle on this rank's shards."""

    def __init__(self, opened: OpenedModel, corpus: EncodedCorpus, spec: RoundSpec) -> None:
        self._opened, self._corpus, self._spec = opened, corpus, spec
        self._objective = build_objective(spec.objective, spec.holdout_loss)
        self._gradient_batches: list[MicroBatch] = []
        self._curvature_minibatch: Minibatch | None = None
        self._linearisations: list[Linearisation] = []
        self._gradient = torch.zeros_like(opened.weights.master)
        self._krylov: LanczosBasis | None = None
        self._descent: InnerDescent | None = None
        self._backup: Tensor | None = None
        self._optimizer: ShardedOptimizer | None = None
        self._step_index = 0
        self.cached: bool | None = None
        """Whether products keep their graphs; decided at the first product."""
        self.cached_bytes = 0
        """What cached mode would keep (measured on one micro-batch, scaled), largest rank."""

    # -- minibatches --------------------------------------------------------------------------------------

    def _roles(self, size: int) -> tuple[int, int]:
        objective = self._objective
        if objective.uses_forget and objective.uses_retain:
            return max(1, size // 2), max(1, size - size // 2)
        return (size, 0) if objective.uses_forget else (0, size)

    def _draw(self, step_index: int) -> Minibatch:
        solver, spec = self._spec.solver, self._spec
        num_forget, num_retain = self._roles(solver.gradient_batch)
        return Minibatch(
            draw(solver.seed, spec.round_index, step_index, "forget", spec.forget, num_forget),
            draw(solver.seed, spec.round_index, step_index, "retain", spec.retain, num_retain),
        )

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
        self, batch: MicroBatch, cached: bool, keep_forward: bool = False, exact: bool = False
    ) -> Linearisation:
        opened, product = self._opened, self._spec.curvature.product
        store = opened.exact_store if exact else opened.store
        return Linearisation(
            opened.segmented, store, batch.inputs, batch.loss, product, cached=cached, keep_forward=keep_forward
        )

    # -- StepOracle ---------------------------------------------------------------------------------------

    def begin_step(self, step_index: int) -> StepStart:
        """Draw the step's minibatches and compute the gradient. All ranks must call this."""
        self._krylov = self._descent = self._backup = None
        self._linearisations, self._step_index = [], step_index
        minibatch = self._draw(step_index)
        self._gradient_batches = self._micro_batches(minibatch)
        self._curvature_minibatch = minibatch.head(*self._roles(self._spec.solver.curvature_batch))
        return self._compute_gradient()

    def _compute_gradient(self) -> StepStart:
        self._gradient.zero_()
        local = torch.zeros((), dtype=torch.float64)
        # Keeping the blocks' graphs from forward to backward is safe once cached mode is known to fit: a gradient's
        # graph is a part of what a product keeps.
        keep = self._spec.curvature.mode == "cached" or self.cached is True
        for batch in self._gradient_batches:
            local += self._linearise(batch, cached=False, keep_forward=keep).gradient(self._gradient).double().cpu()
        if self._spec.solver.method == "scurenewton" and self._opened.exact_store is not self._opened.store:
            local = self._local_loss()  # what trials are compared with must be as exact as they are
        names = sorted(self._gradient_batches[0].loss.terms)
        sums = [sum(float(batch.loss.terms[name]) for batch in self._gradient_batches) for name in names]
        total = self._opened.communicator.all_reduce_sum(torch.tensor([float(local), *sums], dtype=torch.float64))
        terms = {name: float(value) for name, value in zip(names, total[1:], strict=True)}
        return StepStart(float(total[0]), self._opened.space.norm(self._gradient), terms)

    def extend_krylov(self) -> KrylovEntry:
        """One more Lanczos step on the curvature minibatch. All ranks must call this."""
        if self._krylov is None:
            self._krylov = LanczosBasis(self._opened.space, self._product, self._gradient)
        return self._krylov.extend()

    def try_krylov(self, coefficients: Sequence[float]) -> Trial:
        """Apply `sum_j coefficients[j] q_j` tentatively. All ranks must call this."""
        assert self._krylov is not None, "try_krylov before extend_krylov"
        return self._try(self._krylov.combine(coefficients))

    def begin_descent(self, perturbation: float) -> None:
        """Start the inner gradient descent from zero. All ranks must call this."""
        # A seed of its own for every step, so that no two steps are perturbed alike.
        seed = (self._spec.solver.seed * 1_000_003 + self._spec.round_index) * 1_000_003 + self._step_index
        self._descent = InnerDescent(self._opened.space, self._product, self._gradient, perturbation, seed)

    def descend(self, cubic_coefficient: float, learning_rate: float) -> InnerDescentEntry:
        """One inner step, one product. All ranks must call this."""
        assert self._descent is not None, "descend before begin_descent"
        return self._descent.descend(cubic_coefficient, learning_rate)

    def try_descent(self) -> Trial:
        """Apply the inner iterate tentatively. All ranks must call this."""
        assert self._descent is not None, "try_descent before begin_descent"
        return self._try(self._descent.update)

    def undo(self) -> None:
        """Restore the weights bit for bit. All ranks must call this."""
        assert self._backup is not None, "undo without a tentative update"
        self._opened.weights.set_master(self._backup)
        self._backup = None

    def accept(self) -> None:
        """Keep the tentative update, and nothing else of the step. All ranks must call this."""
        assert self._backup is not None, "accept without a tentative update"
        # Graphs and basis vectors can be most of a rank's memory, and scoring comes next.
        self._backup = self._krylov = self._descent = None
        self._linearisations = []

    def first_order_step(self, step_index: int, learning_rate: float) -> StepStart:
        """One AdamW or SGD step of the sharded optimiser. All ranks must call this."""
        solver = self._spec.solver
        start = self.begin_step(step_index)
        if not math.isfinite(start.loss) or not math.isfinite(start.gradient_norm):
            return start
        if self._optimizer is None:
            assert solver.method != "scurenewton", "a first-order step in a second-order round"
            self._optimizer = ShardedOptimizer(self._opened, solver.method, solver.weight_decay)
        self._optimizer.step(self._gradient, learning_rate)
        return start

    # -- parts --------------------------------------------------------------------------------------------

    def _product(self, vector: Tensor) -> Tensor:
        if not self._linearisations:
            assert self._curvature_minibatch is not None
            batches = self._micro_batches(self._curvature_minibatch)
            if self.cached is None:
                self.cached = self._choose_mode(batches)
            self._linearisations = [self._linearise(batch, self.cached) for batch in batches]
        result = torch.zeros_like(vector)
        for linearisation in self._linearisations:
            linearisation.product(vector, result)
        return result

    def _choose_mode(self, batches: list[MicroBatch]) -> bool:
        """Cached or recompute, the same on every rank; measures one micro-batch when the mode is `auto`."""
        config, communicator = self._spec.curvature, self._opened.communicator
        if config.mode != "auto":
            return config.mode == "cached"
        kept = self._linearise(batches[0], cached=False).measure_cached_bytes() * len(batches)
        self.cached_bytes = int(communicator.all_reduce_max(torch.tensor([float(kept)]))[0])
        if config.memory_budget_gib is not None:
            budget = config.memory_budget_gib * 2**30
        elif communicator.device.type == "cuda":
            budget = torch.cuda.mem_get_info()[0] / 2
        else:
            budget = psutil.virtual_memory().available / communicator.spec.local_world_size / 2
        return communicator.all_true(self.cached_bytes <= budget)

    def _try(self, update: Tensor) -> Trial:
        weights, space = self._opened.weights, self._opened.space
        norm = space.norm(update)
        self._backup = weights.master.clone()
        weights.master.add_(update)
        weights.refresh()
        return Trial(self._loss(), norm)

    def _local_loss(self) -> Tensor:
        """This rank's share of the loss on the gradient minibatch, at the master's precision.

        A step changes weights by less than bfloat16 resolves: a trial in the compute dtype would see a few per cent
        of it and reject every step.
        """
        local = torch.zeros((), dtype=torch.float64)
        for batch in self._gradient_batches:
            local += self._linearise(batch, cached=False, exact=True).loss().double().cpu()
        return local

    def _loss(self) -> float:
        return float(self._opened.communicator.all_reduce_sum(self._local_loss().reshape(1))[0])
