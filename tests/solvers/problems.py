"""Small problems with noise between steps, for tests of solvers that remember."""

import torch

from distributed_unlearn.solvers.problem import Memory, StepProblem
from distributed_unlearn.solvers.space import HessianOperator
from tests.solvers.memory_oracle import LocalSpace, Objective

SIZE = 12


def random_vector(seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(seed: int, size: int = SIZE) -> torch.Tensor:
    matrix = random_vector(seed, size * size).view(size, size)
    return (matrix + matrix.T) / 2


def noisy(seed: int = 0, quartic: float = 0.3) -> Objective:
    """An indefinite quadratic whose linear term changes with the step, and a quartic that bounds it."""
    hessian = symmetric(seed)

    def objective(w: torch.Tensor, step: int) -> torch.Tensor:
        return 0.5 * w @ hessian @ w + w @ random_vector(100 + step) + quartic * (w**4).sum()

    return objective


def derivatives(objective: Objective, point: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient and dense Hessian at a point."""

    def function(w: torch.Tensor) -> torch.Tensor:
        return objective(w, step)

    gradient = torch.autograd.functional.jacobian(function, point)
    return gradient, torch.autograd.functional.hessian(function, point)  # type: ignore[no-untyped-call]


def problem(
    gradient: torch.Tensor, product: HessianOperator, scale: torch.Tensor | None = None, memory: Memory | None = None
) -> StepProblem:
    """A step's problem in one process, already in the metric's coordinates."""
    ones = torch.ones_like(gradient)
    space = LocalSpace(gradient.numel())
    return StepProblem(space, gradient, (), product, scale, ones, lambda: ones, 0, memory or Memory())
