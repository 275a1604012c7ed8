"""A StepOracle on one flat float64 vector, with the objective a plain function: no processes, everything counted."""

from collections.abc import Callable, Sequence

import torch

from distributed_unlearn.solvers.inner.descent import InnerDescent
from distributed_unlearn.solvers.inner.lanczos import LanczosBasis
from distributed_unlearn.solvers.protocols import InnerDescentEntry, KrylovEntry, StepStart, Trial

Objective = Callable[[torch.Tensor, int], torch.Tensor]
"""`(weights, step_index) -> scalar`; the step index selects the minibatch."""


class LocalSpace:
    """The vector space of one process; counts its reductions."""

    def __init__(self) -> None:
        self.num_reductions = 0

    def dots(self, rows: Sequence[torch.Tensor], x: torch.Tensor) -> list[float]:
        self.num_reductions += 1
        return [float(torch.dot(row.double(), x.double())) for row in rows]

    def random_normal(self, like: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


class MemoryOracle:
    """See StepOracle. `curvature` defaults to the objective itself, i.e. the same minibatch."""

    def __init__(self, objective: Objective, weights: torch.Tensor, curvature: Objective | None = None) -> None:
        self.objective, self.curvature = objective, curvature or objective
        self.weights = weights.clone()
        self.space = LocalSpace()
        self.num_products = self.num_trials = self.num_undone = self.num_accepted = 0
        self._before: torch.Tensor | None = None

    def _hvp(self, v: torch.Tensor) -> torch.Tensor:
        self.num_products += 1
        point = self.weights.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.curvature(point, self.step_index), point, create_graph=True)
        if not gradient.requires_grad:
            return torch.zeros_like(v)
        return torch.autograd.grad(gradient, point, v)[0]

    def begin_step(self, step_index: int) -> StepStart:
        assert self._before is None
        self.step_index = step_index
        point = self.weights.clone().requires_grad_()
        loss = self.objective(point, step_index)
        (self.gradient,) = torch.autograd.grad(loss, point)
        self._basis: LanczosBasis | None = None
        self._descent: InnerDescent | None = None
        value = float(loss.detach())
        return StepStart(value, float(self.gradient.norm()), {"loss": value})

    def extend_krylov(self) -> KrylovEntry:
        if self._basis is None:
            self._basis = LanczosBasis(self.space, self._hvp, self.gradient)
        return self._basis.extend()

    def _apply(self, update: torch.Tensor) -> Trial:
        assert self._before is None
        self._before = self.weights.clone()
        self.weights = self.weights + update
        self.num_trials += 1
        with torch.no_grad():
            return Trial(float(self.objective(self.weights, self.step_index)), float(update.norm()))

    def try_krylov(self, coefficients: Sequence[float]) -> Trial:
        assert self._basis is not None
        return self._apply(self._basis.combine(coefficients))

    def begin_descent(self, perturbation: float) -> None:
        assert self._before is None
        self._descent = InnerDescent(self.space, self._hvp, self.gradient, perturbation, self.step_index)

    def descend(self, cubic_coefficient: float, learning_rate: float) -> InnerDescentEntry:
        assert self._descent is not None
        return self._descent.descend(cubic_coefficient, learning_rate)

    def try_descent(self) -> Trial:
        assert self._descent is not None
        return self._apply(self._descent.update)

    def undo(self) -> None:
        assert self._before is not None
        self.weights, self._before = self._before, None
        self.num_undone += 1

    def accept(self) -> None:
        assert self._before is not None
        self._before = None
        self.num_accepted += 1

    def first_order_step(self, step_index: int, learning_rate: float) -> StepStart:
        start = self.begin_step(step_index)
        self.weights = self.weights - learning_rate * self.gradient
        return start
