"""What the driver's half of an inner solver proposes for a step, and what a method needs of it."""

from dataclasses import dataclass
from typing import Protocol

from distributed_unlearn.solvers.protocols import InnerSpec, StepStart, Trial
from distributed_unlearn.solvers.solution import Result


@dataclass(frozen=True)
class Proposal:
    """An update as its model sees it, in the step's metric; scalars only, None where they do not apply."""

    alpha: float | None = None
    gamma: float | None = None
    predicted_reduction: float | None = None
    curvature: float | None = None
    """`<y, H y>` of the update, for the model's error at a trial."""
    residual: float | None = None
    """The model's residual over `||g||`."""
    smallest_ritz_value: float | None = None
    largest_ritz_value: float | None = None
    result: Result = Result.successful


NO_PROPOSAL = Proposal(result=Result.nonfinite)
"""Something was not finite: there is nothing to try."""


class InnerSolver(Protocol):
    """The driver's half of an inner solver of the cubic model; `begin` is called once a step."""

    @property
    def num_products(self) -> int:
        """Of the current step."""
        ...

    @property
    def num_krylov_steps(self) -> int:
        """Of the current step; 0 where there is no Krylov space."""
        ...

    @property
    def spec(self) -> InnerSpec:
        """What the shards need to take part."""
        ...

    def begin(self, start: StepStart) -> None:
        """A new step on the oracle, whose gradient is finite and not zero."""
        ...

    def propose(self, cubic_coefficient: float) -> Proposal:
        """Minimise the model with this M."""
        ...

    def attempt(self) -> Trial:
        """Apply the last proposal tentatively."""
        ...
