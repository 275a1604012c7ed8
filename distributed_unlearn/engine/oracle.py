"""The `StepOracle` on shards: gradients, exact products and tentative updates of one rank.

Every method is collective: all ranks must call the same methods in the same order with the same arguments.
Floats that come back are the same on every rank.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_unlearn.data.batches import Corpus
from distributed_unlearn.engine.minibatch import MinibatchObjective
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.engine.optimizer import ShardedOptimizer
from distributed_unlearn.solvers.inner.descent import InnerDescent
from distributed_unlearn.solvers.inner.lanczos import LanczosBasis
from distributed_unlearn.solvers.protocols import InnerDescentEntry, KrylovEntry, StepStart, Trial
from distributed_unlearn.workers.messages import RoundSpec


class ShardedOracle:
    """One round's step oracle on this rank's shards."""

    def __init__(self, opened: OpenedModel, corpus: Corpus, spec: RoundSpec) -> None:
        self._opened, self._spec = opened, spec
        self._minibatch = MinibatchObjective(opened, corpus, spec)
        self._gradient = torch.zeros_like(opened.weights.master)
        self._krylov: LanczosBasis | None = None
        self._descent: InnerDescent | None = None
        self._backup: Tensor | None = None
        self._optimizer: ShardedOptimizer | None = None
        self._step_index = 0

    @property
    def cached(self) -> bool | None:
        """Whether products keep their graphs; None before the first gradient."""
        return None if self._minibatch.memory is None else self._minibatch.memory.cached

    @property
    def cached_bytes(self) -> int:
        """What cached mode keeps, or would keep, on the largest rank; 0 where there are no products."""
        return 0 if self._minibatch.memory is None else self._minibatch.memory.cached_bytes

    # -- StepOracle ---------------------------------------------------------------------------------------

    def begin_step(self, step_index: int) -> StepStart:
        """Draw the step's minibatches and compute the gradient. All ranks must call this."""
        self._krylov = self._descent = self._backup = None
        self._step_index = step_index
        self._minibatch.draw(step_index)
        return self._compute_gradient()

    def _compute_gradient(self) -> StepStart:
        self._gradient.zero_()
        found = self._minibatch.gradient(self._gradient, exact_loss=self._spec.solver.method == "scurenewton")
        return StepStart(found.loss, self._opened.space.norm(self._gradient), found.terms)

    def extend_krylov(self) -> KrylovEntry:
        """One more Lanczos step on the curvature minibatch. All ranks must call this."""
        if self._krylov is None:
            self._krylov = LanczosBasis(self._opened.space, self._minibatch.product, self._gradient)
        return self._krylov.extend()

    def try_krylov(self, coefficients: Sequence[float]) -> Trial:
        """Apply `sum_j coefficients[j] q_j` tentatively. All ranks must call this."""
        assert self._krylov is not None, "try_krylov before extend_krylov"
        return self._try(self._krylov.combine(coefficients))

    def begin_descent(self, perturbation: float) -> None:
        """Start the inner gradient descent from zero. All ranks must call this."""
        # A seed of its own for every step, so that no two steps are perturbed alike.
        seed = (self._spec.solver.seed * 1_000_003 + self._spec.round_index) * 1_000_003 + self._step_index
        self._descent = InnerDescent(self._opened.space, self._minibatch.product, self._gradient, perturbation, seed)

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
        self._minibatch.release()

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

    def _try(self, update: Tensor) -> Trial:
        weights, space = self._opened.weights, self._opened.space
        norm = space.norm(update)
        self._backup = weights.master.clone()
        weights.master.add_(update)
        weights.refresh()
        return Trial(self._minibatch.loss(), norm)
