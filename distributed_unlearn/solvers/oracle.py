"""The step oracle where the vectors live: gradients, an inner solver's shard half, tentative updates.

Pure mathematics over protocols: the engine gives it a sharded model, the tests a function of one vector.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from distributed_unlearn.solvers.sampled import SampledChange
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
        self._start_loss = math.nan
        self._trial: Trial | None = None
        """Of the tentative update."""
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
        if spec.measures_remainder and self._objective.has_own_curvature_minibatch:
            self._curvature_gradient = torch.zeros_like(self._gradient)
        found = self._objective.gradient(
            self._gradient, spec.inner.measures_trials, forget_part, self._curvature_gradient
        )
        self._start_loss = found.loss
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
        assert self._trial is None, "a candidate while another one is applied"
        y = self._inner.candidate(*values)
        update = self._problem.to_weights(y)
        update_norm = self._norm(update)
        metric_norm = update_norm if self._problem.scale is None else self._norm(y)
        measures = self._spec.inner.measures_trials
        if measures:
            self._backup = self._weights.master.clone()
        self._weights.master.add_(update)
        self._weights.refresh()
        self._trial = Trial(None, update_norm, metric_norm)
        if measures:
            self._trial = self._measured(self._trial, update)
        return self._trial

    def measure_whole(self) -> Trial:
        """See `StepOracle.measure_whole`. All ranks must call this."""
        assert self._trial is not None and self._backup is not None, "no measured update is applied"
        loss = self._start_loss + self._objective.whole_change(self._at_start)
        self._trial = replace(self._trial, loss=loss, loss_error=0.0)
        return self._trial

    def undo(self) -> None:
        """See `StepOracle.undo`. All ranks must call this."""
        assert self._backup is not None, "undo without a tentative update whose loss was measured"
        self._weights.set_master(self._backup)
        self._backup = self._trial = None

    def accept(self) -> None:
        """Keep the tentative update, and nothing else of the step but what is remembered. All ranks must call this."""
        assert self._inner is not None and self._trial is not None, "accept without a tentative update"
        self._inner.accept()
        self._trial = None
        self.abandon()

    def abandon(self) -> None:
        """See `StepOracle.abandon`. Not collective."""
        assert self._trial is None, "a tentative update is applied"
        # Graphs and basis vectors can be most of a rank's memory, and scoring comes next.
        self._drop_step()
        self._objective.release()

    # -- parts --------------------------------------------------------------------------------------------

    def _drop_step(self) -> None:
        self._spec = self._problem = self._inner = self._backup = self._trial = None
        self._curvature_gradient = None

    def _norm(self, x: torch.Tensor) -> float:
        return math.sqrt(self._space.dots([x], x)[0])

    def _product(self, y: torch.Tensor) -> torch.Tensor:
        assert self._problem is not None
        # S is symmetric: S H S y from H (S y)
        return self._problem.to_weights(self._objective.product(self._problem.to_weights(y)))

    def _measured(self, trial: Trial, update: torch.Tensor) -> Trial:
        """The trial with its loss, from the curvature minibatch or the whole, and the remainder."""
        assert self._spec is not None
        remainder, error = None, 0.0
        samples, slopes = self._spec.samples_trials, self._curvature_gradient
        change = self._objective.sampled_change() if samples or slopes is not None else SampledChange(math.nan, None)
        if slopes is not None and math.isfinite(change.total):
            remainder = change.total - self._space.dots([slopes], update)[0]
        total = change.total
        if samples and change.error is not None:
            error = change.error
        elif change.error != 0.0:
            total = self._objective.whole_change(self._at_start)
        return replace(trial, loss=self._start_loss + total, remainder=remainder, loss_error=error)

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        """The weights before the tentative update, for a while. All ranks must enter and leave it."""
        assert self._backup is not None
        tried = self._weights.master.clone()
        self._weights.set_master(self._backup)
        yield
        self._weights.set_master(tried)
