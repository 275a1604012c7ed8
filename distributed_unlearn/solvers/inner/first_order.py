"""AdamW and SGD as inner solvers: one update from the gradient alone, with moments that the round remembers.

Weight decay is decoupled for AdamW, `w -= eta lambda w`, and part of the gradient for SGD, as in torch; in both it
spares what `StepProblem.decays` spares.
"""

from dataclasses import dataclass

import torch

from distributed_unlearn.solvers.adamw import AdamWConstants, adamw_update
from distributed_unlearn.solvers.problem import Memory, StepProblem

_FIRST, _SECOND, _COUNT = "adamw first moment", "adamw second moment", "adamw steps"
_VELOCITY = "sgd velocity"


def _decay(problem: StepProblem, weight_decay: float) -> torch.Tensor:
    """`lambda w` where weights decay, a new vector."""
    return problem.decays().mul(problem.weights).mul_(weight_decay)


class AdamWShard:
    """`candidate(eta)` takes the gradient into the moments and gives AdamW's update."""

    def __init__(self, problem: StepProblem, spec: "AdamWSpec") -> None:
        self._problem, self._spec = problem, spec

    def advance(self, *values: float) -> tuple[float, ...]:
        """Nothing to prepare."""
        return ()

    def candidate(self, *values: float) -> torch.Tensor:
        """See `adamw_update`."""
        (learning_rate,) = values
        spec, gradient, memory = self._spec, self._problem.gradient, self._problem.memory
        count = memory.numbers[_COUNT] = memory.numbers.get(_COUNT, 0.0) + 1.0
        first, second = (_vector(memory, name, gradient) for name in (_FIRST, _SECOND))
        decay = _decay(self._problem, spec.weight_decay) if spec.weight_decay > 0.0 else None
        return adamw_update(gradient, first, second, count, learning_rate, decay, spec.constants)

    def accept(self) -> None:
        """The moments were noted already."""


@dataclass(frozen=True)
class AdamWSpec:
    """AdamW."""

    weight_decay: float
    constants: AdamWConstants = AdamWConstants()
    measures_trials: bool = False
    separates_roles: bool = False

    def start(self, problem: StepProblem) -> AdamWShard:
        """See `InnerSpec.start`."""
        return AdamWShard(problem, self)


class SgdShard:
    """`candidate(eta)` takes the gradient into the velocity and gives SGD's update."""

    def __init__(self, problem: StepProblem, spec: "SgdSpec") -> None:
        self._problem, self._spec = problem, spec

    def advance(self, *values: float) -> tuple[float, ...]:
        """Nothing to prepare."""
        return ()

    def candidate(self, *values: float) -> torch.Tensor:
        """`-eta u`, `u <- mu u + g + lambda w` (torch's momentum, without dampening)."""
        (learning_rate,) = values
        spec, memory = self._spec, self._problem.memory
        direction = self._problem.gradient
        if spec.weight_decay > 0.0:
            direction = direction + _decay(self._problem, spec.weight_decay)
        if spec.momentum > 0.0:
            direction = _vector(memory, _VELOCITY, direction).mul_(spec.momentum).add_(direction)
        return direction * -learning_rate

    def accept(self) -> None:
        """The velocity was noted already."""


@dataclass(frozen=True)
class SgdSpec:
    """SGD, with momentum where it is above 0."""

    weight_decay: float
    momentum: float = 0.0
    measures_trials: bool = False
    separates_roles: bool = False

    def start(self, problem: StepProblem) -> SgdShard:
        """See `InnerSpec.start`."""
        return SgdShard(problem, self)


def _vector(memory: Memory, name: str, like: torch.Tensor) -> torch.Tensor:
    """The remembered vector of this name, zero at first."""
    if name not in memory.vectors:
        memory.vectors[name] = torch.zeros_like(like)
    return memory.vectors[name]
