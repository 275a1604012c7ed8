"""One step's problem on one rank, in the coordinates of the step's metric, and what a round remembers between steps."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from distributed_unlearn.solvers.space import HessianOperator, VectorSpace


@dataclass
class Memory:
    """What a round's steps leave for later ones on this rank: parts of vectors and numbers, by name.

    Numbers are the same on all ranks. A resume saves and restores it as it is, rank by rank.
    """

    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StepProblem:
    """The model `g'Delta + 1/2 Delta'H Delta` of one step on this rank, in coordinates `y` with `Delta = S y`.

    `S = P^(1/2)` is diagonal and comes from the step's metric (`AdamMetric`), the identity where there is none. An
    inner solver that works on `y` with gradient `S g`, products `S H S y` and the Euclidean norm works in the metric
    without knowing it.
    """

    space: VectorSpace
    gradient: torch.Tensor
    """`S g`, this rank's part; read only."""
    parts: tuple[torch.Tensor, ...]
    """`S g` of the forget records and of the retain records, whose sum is `gradient`; empty where not asked for."""
    product: HessianOperator
    """`y -> S H S y` on the curvature minibatch. All ranks must call it together."""
    scale: torch.Tensor | None
    """The diagonal of `S`; None for the identity."""
    weights: torch.Tensor
    """The weights at the start of the step, as long as no candidate is applied; read only."""
    decays: Callable[[], torch.Tensor]
    """Which weights decay, as 0.0 and 1.0."""
    seed: int
    """Of this step's random vectors: another one for every round and step."""
    memory: Memory

    def to_weights(self, y: torch.Tensor) -> torch.Tensor:
        """`Delta = S y`; `y` itself where S is the identity."""
        return y if self.scale is None else y * self.scale

    def from_weights(self, update: torch.Tensor) -> torch.Tensor:
        """`y = S^-1 Delta`; `Delta` itself where S is the identity."""
        return update if self.scale is None else update / self.scale
