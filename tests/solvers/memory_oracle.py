"""A StepOracle on one flat float64 vector, with the objective a plain function: no processes, everything counted."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from distributed_unlearn.solvers.oracle import VectorOracle
from distributed_unlearn.solvers.protocols import LossAndTerms, StepSpec, StepStart, Trial
from distributed_unlearn.solvers.sampled import SampledChange

Objective = Callable[[torch.Tensor, int], torch.Tensor]
"""`(weights, step_index) -> scalar`; the step index selects the minibatch."""


class LocalSpace:
    """The vector space of one process; counts its reductions."""

    def __init__(self, num_entries: int = 0) -> None:
        self.num_reductions = 0
        self.num_entries = num_entries

    def dots(self, rows: Sequence[torch.Tensor], x: torch.Tensor) -> list[float]:
        self.num_reductions += 1
        return [float(torch.dot(row.double(), x.double())) for row in rows]

    def random_normal(self, like: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        return x.clone()

    def scatter(self, full: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        assert full is not None
        return full.to(like.dtype)

    def broadcast(self, values: Sequence[float], count: int) -> list[float]:
        assert len(values) == count
        return list(values)


class FlatWeights:
    """Weights that need no refreshing."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.master = weights.clone()

    def set_master(self, master: torch.Tensor) -> None:
        self.master.copy_(master)

    def refresh(self) -> None:
        pass


class PlainObjective:
    """See StepObjective; derivatives by reverse over reverse."""

    def __init__(self, weights: FlatWeights, objective: Objective, curvature: Objective | None) -> None:
        self.weights, self.objective, self.curvature = weights, objective, curvature or objective
        self.has_own_curvature_minibatch = curvature is not None
        self.num_products = 0
        self.forget: Objective | None = None
        """The forget records' part of the objective, where a test asks for it."""
        self.sample_error: float | None = None
        """Of the curvature minibatch as a sample of the gradient's; None: it is none."""
        self.num_whole = self.num_released = 0

    def draw(self, step_index: int, by_role: bool) -> None:
        self.step_index = step_index

    def _value_and_gradient(self, objective: Objective) -> tuple[float, torch.Tensor]:
        point = self.weights.master.clone().requires_grad_()
        loss = objective(point, self.step_index)
        return float(loss.detach()), torch.autograd.grad(loss, point)[0]

    def gradient(
        self,
        gradient: torch.Tensor,
        for_trials: bool,
        forget_part: torch.Tensor | None = None,
        curvature_part: torch.Tensor | None = None,
    ) -> LossAndTerms:
        value, found = self._value_and_gradient(self.objective)
        gradient.add_(found)
        self.start, self.curvature_start = value, self._value(self.curvature)
        if curvature_part is not None:
            curvature_part.add_(self._value_and_gradient(self.curvature)[1])
        if forget_part is not None:
            assert self.forget is not None
            forget_part.add_(self._value_and_gradient(self.forget)[1])
        return LossAndTerms(value, {"loss": value})

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        self.num_products += 1
        point = self.weights.master.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.curvature(point, self.step_index), point, create_graph=True)
        if not gradient.requires_grad:
            return torch.zeros_like(vector)
        return torch.autograd.grad(gradient, point, vector)[0]

    def _value(self, objective: Objective) -> float:
        with torch.no_grad():
            return float(objective(self.weights.master, self.step_index))

    def sampled_change(self) -> SampledChange:
        error = self.sample_error if self.has_own_curvature_minibatch else 0.0
        return SampledChange(self._value(self.curvature) - self.curvature_start, error)

    def whole_change(self, at_start: Callable[[], AbstractContextManager[None]]) -> float:
        self.num_whole += 1
        return self._value(self.objective) - self.start

    def release(self) -> None:
        self.num_released += 1


class MemoryOracle(VectorOracle):
    """See StepOracle. `curvature` defaults to the objective itself, i.e. the same minibatch."""

    def __init__(self, objective: Objective, weights: torch.Tensor, curvature: Objective | None = None) -> None:
        flat = FlatWeights(weights)
        self.plain = PlainObjective(flat, objective, curvature)
        super().__init__(LocalSpace(weights.numel()), self.plain, flat, 0, lambda: torch.ones_like(weights))
        self.num_trials = self.num_undone = self.num_accepted = 0

    @property
    def weights(self) -> torch.Tensor:
        return self.plain.weights.master

    @property
    def num_products(self) -> int:
        return self.plain.num_products

    def begin_step(self, step_index: int, spec: StepSpec) -> StepStart:
        assert self._trial is None
        return super().begin_step(step_index, spec)

    def candidate(self, *values: float) -> Trial:
        self.num_trials += 1
        return super().candidate(*values)

    def undo(self) -> None:
        super().undo()
        self.num_undone += 1

    def accept(self) -> None:
        super().accept()
        self.num_accepted += 1
