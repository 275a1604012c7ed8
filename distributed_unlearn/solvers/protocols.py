"""What a solver may ask of a model, where the vectors live and where only scalars do.

`StepObjective` and `WeightShard` are what a rank has, `StepOracle` is the same mathematics seen from the driver:
vectors stay where they are, floats come back.

An inner solver has two halves in one file of `solvers.inner`: the driver's half looks at floats and decides, the
shard's half holds vectors and obeys. The oracle passes floats between them and knows neither.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from distributed_unlearn.solvers.metric import AdamMetric
from distributed_unlearn.solvers.problem import StepProblem
from distributed_unlearn.solvers.sampled import SampledChange


@dataclass(frozen=True)
class StepStart:
    """The objective at the current weights on the step's gradient minibatch."""

    loss: float
    """Objective, nats per token scale."""
    gradient_norm: float
    """`||g||`, Euclidean."""
    metric_gradient_norm: float
    """`sqrt(g'P g)`, the norm of the gradient in the step's metric (see `AdamMetric`); `||g||` without one."""
    terms: dict[str, float]
    """The objective's parts by name, e.g. `retain_loss_nats_per_token`; for logs and stopping rules."""


@dataclass(frozen=True)
class Trial:
    """The weights with a tentative update applied."""

    loss: float | None
    """Objective on the same gradient minibatch at `w + Delta`; may be NaN or infinite. None: not measured.

    It is the step's first loss plus the change, which is measured record by record in float64: as exact as the
    difference of two losses, each of them rounded to float32, would not be."""
    update_norm: float
    """`||Delta||` of the applied vector, Euclidean."""
    metric_norm: float
    """`sqrt(Delta' P^-1 Delta)`, its length in the step's metric; `||Delta||` without one."""
    remainder: float | None = None
    """`f(w + Delta) - f(w) - g'Delta` with loss and gradient of the *curvature* minibatch; None: not measured."""
    loss_error: float = 0.0
    """Where `loss` is an estimate from a part of the minibatch: the true one is below `loss + loss_error` with
    probability `sampled.CONFIDENCE`; 0.0: the whole minibatch was measured."""


class InnerShard(Protocol):
    """The shard's half of an inner solver, for one step. All ranks must call every method together."""

    def advance(self, *values: float) -> tuple[float, ...]:
        """Do one unit of work; what goes in and comes out is between the two halves. The same on all ranks."""
        ...

    def candidate(self, *values: float) -> torch.Tensor:
        """The local part of the update, in the problem's coordinates; the caller does not change it."""
        ...

    def accept(self) -> None:
        """The last candidate was kept: note what later steps need, in the problem's memory."""
        ...


class InnerSpec(Protocol):
    """What crosses to the shards before a step: a frozen dataclass that makes the shard's half."""

    @property
    def measures_trials(self) -> bool:
        """Whether a candidate's loss is measured, so that it may be undone."""
        ...

    @property
    def separates_roles(self) -> bool:
        """Whether the gradient is wanted in two parts, `StepProblem.parts`."""
        ...

    def start(self, problem: StepProblem) -> InnerShard:
        """The shard's half for one step; no communication."""
        ...


@dataclass(frozen=True)
class StepSpec:
    """How the shards take part in a step."""

    inner: InnerSpec
    metric: AdamMetric | None = None
    """None is the Euclidean metric."""
    measures_remainder: bool = False
    """Trials also measure `Trial.remainder`, where the curvature minibatch is not the gradient minibatch."""
    samples_trials: bool = False
    """Trials measure the loss on the curvature minibatch alone, where it is a sample of the gradient minibatch, until
    `measure_whole` is called."""


class StepOracle(Protocol):
    """One stochastic step, driven by scalars.

    Order of calls: `begin_step`, then `advance` any number of times and `candidate`; each `candidate` is followed by
    exactly one of `accept` or `undo`; after `undo` another `advance` or `candidate` of the same step is allowed.
    """

    def begin_step(self, step_index: int, spec: StepSpec) -> StepStart:
        """Draw the minibatches of this step and compute the gradient; forget the previous step's vectors."""
        ...

    def advance(self, *values: float) -> tuple[float, ...]:
        """`InnerShard.advance` of the step's inner solver."""
        ...

    def candidate(self, *values: float) -> Trial:
        """Apply `InnerShard.candidate` tentatively and evaluate the objective."""
        ...

    def measure_whole(self) -> Trial:
        """The candidate's trial once more, its loss measured on the whole gradient minibatch."""
        ...

    def undo(self) -> None:
        """Restore the weights before the tentative update, bit for bit."""
        ...

    def accept(self) -> None:
        """Keep the tentative update; the step is over."""
        ...

    def abandon(self) -> None:
        """The step is over and the weights are as before it: let go of its graphs and vectors."""
        ...


@dataclass(frozen=True)
class LossAndTerms:
    """An objective on a whole minibatch, the same on every rank."""

    loss: float
    terms: dict[str, float]
    """The objective's parts by name; their sum need not be the loss."""


class StepObjective(Protocol):
    """An objective at the current weights on a step's two minibatches; this rank's part of its vectors.

    Products are those of the curvature minibatch, which is a random sample of the gradient minibatch; its loss is the
    sample's estimate of the gradient minibatch's. All ranks must call every method but `draw` and `release`.
    """

    @property
    def has_own_curvature_minibatch(self) -> bool:
        """False where the curvature minibatch is the whole gradient minibatch."""
        ...

    def draw(self, step_index: int, by_role: bool) -> None:
        """Draw the minibatches of this step; `by_role` if a `forget_part` will be asked for."""
        ...

    def gradient(
        self,
        gradient: torch.Tensor,
        for_trials: bool,
        forget_part: torch.Tensor | None = None,
        curvature_part: torch.Tensor | None = None,
    ) -> LossAndTerms:
        """Add the gradient to `gradient`, the forget records' part of it to `forget_part`.

        The gradient of the curvature minibatch's own loss is added to `curvature_part`. With `for_trials` what losses
        will be compared with is noted.
        """
        ...

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """`H v` (or `G v`), a new vector."""
        ...

    def sampled_change(self) -> SampledChange:
        """The change of the curvature minibatch's loss since the gradient, exact, as an estimate of `whole_change`."""
        ...

    def whole_change(self, at_start: Callable[[], AbstractContextManager[None]]) -> float:
        """The change of the gradient minibatch's loss since the gradient; after `sampled_change` at the same weights.

        Within `at_start()` the weights are those of the gradient.
        """
        ...

    def release(self) -> None:
        """Drop what products keep between calls."""
        ...


class WeightShard(Protocol):
    """This rank's weights."""

    @property
    def master(self) -> torch.Tensor:
        """The weights that updates are added to; changed in place."""
        ...

    def set_master(self, master: torch.Tensor) -> None:
        """Overwrite them. All ranks must call this."""
        ...

    def refresh(self) -> None:
        """Make a change of `master` visible to the objective. All ranks must call this."""
        ...
