"""The step oracle where the vectors live: gradients, an inner solver's shard half, tentative updates.

Pure mathematics over protocols: the engine gives it a sharded model, the tests a function of one vector.
"""

import math
from collections.abc import Callable
from typing import TypedDict

import torch

from distributed_unlearn.solvers.problem import Memory, StepProblem
from distributed_unlearn.solvers.protocols import (
    InnerShard,
    StepObjective,
    StepSpec,
    StepStart,
    Trial,
    WeightShard,
)
from distributed_unlearn.solvers.space import VectorSpace


class OracleState(TypedDict):
    """What an oracle remembers between steps, on one rank; for saving and restoring between two steps."""

    vectors: dict[str, torch.Tensor]
    numbers: dict[str, float]


class VectorOracle:
    """One round's `StepOracle` on one rank's parts of all vectors.

    All ranks must call the same methods in the same order with the same arguments. Floats that come back are the same
    on every rank.
    """

    def __init__(
        self,
        space: VectorSpace,
        objective: StepObjective,
        weights: WeightShard,
        seed: int,
        decays: Callable[[], torch.Tensor],
    ) -> None:
        self._space, self._objective, self._weights = space, objective, weights
        self._seed, self._decays = seed, decays
        self._memory = Memory()
        self._gradient = torch.zeros_like(weights.master)
        self._spec: StepSpec | None = None
        self._problem: StepProblem | None = None
        self._inner: InnerShard | None = None
        self._curvature_gradient: torch.Tensor | None = None
        self._curvature_loss: float | None = None
        self._tentative = False
        self._backup: torch.Tensor | None = None

    # -- between steps ------------------------------------------------------------------------------------

    def state_dict(self) -> OracleState:
        """What the steps so far left for later ones; this rank's own tensors, not copies. Not collective."""
        return {"vectors": dict(self._memory.vectors), "numbers": dict(self._memory.numbers)}

    def load_state_dict(self, state: OracleState) -> None:
        """Go on from another oracle's `state_dict` of the same rank, layout and step. Not collective."""
        device = self._gradient.device
        self._memory.vectors = {name: vector.to(device, copy=True) for name, vector in state["vectors"].items()}
        self._memory.numbers = dict(state["numbers"])

    # -- StepOracle ---------------------------------------------------------------------------------------

    def begin_step(self, step_index: int, spec: StepSpec) -> StepStart:
        """See `StepOracle.begin_step`. All ranks must call this."""
        self._drop_step()
        self._spec = spec
        by_role = spec.inner.separates_roles
        self._objective.draw(step_index, by_role)
        self._gradient.zero_()
        forget_part = torch.zeros_like(self._gradient) if by_role else None
        found = self._objective.gradient(self._gradient, spec.inner.measures_trials, forget_part)
        norm = metric_norm = self._norm(self._gradient)
        gradient, scale = self._gradient, None
        if spec.metric is not None and math.isfinite(norm) and norm > 0.0:
            scale = spec.metric.scale(self._space, self._gradient, self._memory)
            gradient = self._gradient * scale
            metric_norm = self._norm(gradient)
        parts: tuple[torch.Tensor, ...] = ()
        if forget_part is not None:
            of_forget = forget_part if scale is None else forget_part.mul_(scale)
            parts = (of_forget, gradient - of_forget)
        self._problem = StepProblem(
            space=self._space,
            gradient=gradient,
            parts=parts,
            product=self._product,
            scale=scale,
            weights=self._weights.master,
            decays=self._decays,
            seed=(self._seed * 1_000_003 + step_index) % 2**63,  # what a generator of torch takes
            memory=self._memory,
        )
        self._inner = spec.inner.start(self._problem)
        return StepStart(found.loss, norm, metric_norm, found.terms)

    def advance(self, *values: float) -> tuple[float, ...]:
        """See `StepOracle.advance`. All ranks must call this."""
        assert self._inner is not None, "advance before begin_step"
        return self._inner.advance(*values)

    def candidate(self, *values: float) -> Trial:
        """See `StepOracle.candidate`. All ranks must call this."""
        assert self._inner is not None and self._problem is not None and self._spec is not None
        assert not self._tentative, "a candidate while another one is applied"
        y = self._inner.candidate(*values)
        update = self._problem.to_weights(y)
        update_norm = self._norm(update)
        metric_norm = update_norm if self._problem.scale is None else self._norm(y)
        self._tentative = True
        measures = self._spec.inner.measures_trials
        if measures:
            self._backup = self._weights.master.clone()
        self._weights.master.add_(update)
        self._weights.refresh()
        loss = self._objective.loss() if measures else None
        remainder = None if loss is None or not math.isfinite(loss) else self._remainder(update)
        return Trial(loss, update_norm, metric_norm, remainder)

    def undo(self) -> None:
        """See `StepOracle.undo`. All ranks must call this."""
        assert self._backup is not None, "undo without a tentative update whose loss was measured"
        self._weights.set_master(self._backup)
        self._backup, self._tentative = None, False

    def accept(self) -> None:
        """Keep the tentative update, and nothing else of the step but what is remembered. All ranks must call this."""
        assert self._inner is not None and self._tentative, "accept without a tentative update"
        self._inner.accept()
        # Graphs and basis vectors can be most of a rank's memory, and scoring comes next.
        self._drop_step()
        self._objective.release()

    # -- parts --------------------------------------------------------------------------------------------

    def _drop_step(self) -> None:
        self._spec = self._problem = self._inner = self._backup = None
        self._curvature_gradient = self._curvature_loss = None
        self._tentative = False

    def _norm(self, x: torch.Tensor) -> float:
        return math.sqrt(self._space.dots([x], x)[0])

    def _product(self, y: torch.Tensor) -> torch.Tensor:
        assert self._problem is not None and self._spec is not None
        vector = self._problem.to_weights(y)
        wanted = self._spec.measures_remainder and self._objective.has_own_curvature_minibatch
        if wanted and self._curvature_gradient is None:
            self._curvature_gradient = torch.zeros_like(vector)
            product, self._curvature_loss = self._objective.product_and_gradient(vector, self._curvature_gradient)
        else:
            product = self._objective.product(vector)
        # S is symmetric: S H S y from H (S y)
        return self._problem.to_weights(product)

    def _remainder(self, update: torch.Tensor) -> float | None:
        if self._curvature_gradient is None or self._curvature_loss is None:
            return None
        slope = self._space.dots([self._curvature_gradient], update)[0]
        return self._objective.curvature_loss() - self._curvature_loss - slope
