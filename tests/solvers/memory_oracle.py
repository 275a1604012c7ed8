"""A StepOracle on one flat float64 vector, with the objective a plain function: no processes, everything counted."""

from collections.abc import Callable, Sequence

import torch

from distributed_unlearn.solvers.oracle import VectorOracle
from distributed_unlearn.solvers.protocols import LossAndTerms, StepSpec, StepStart, Trial

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

    def draw(self, step_index: int, by_role: bool) -> None:
        self.step_index = step_index

    def _value_and_gradient(self, objective: Objective) -> tuple[float, torch.Tensor]:
        point = self.weights.master.clone().requires_grad_()
        loss = objective(point, self.step_index)
        return float(loss.detach()), torch.autograd.grad(loss, point)[0]

    def gradient(
        self, gradient: torch.Tensor, exact_loss: bool, forget_part: torch.Tensor | None = None
    ) -> LossAndTerms:
        value, found = self._value_and_gradient(self.objective)
        gradient.add_(found)
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

    def product_and_gradient(self, vector: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, float]:
        value, found = self._value_and_gradient(self.curvature)
        gradient.add_(found)
        return self.product(vector), value

    def _value(self, objective: Objective) -> float:
        with torch.no_grad():
            return float(objective(self.weights.master, self.step_index))

    def loss(self) -> float:
        return self._value(self.objective)

    def curvature_loss(self) -> float:
        return self._value(self.curvature)

    def release(self) -> None:
        pass


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
        assert not self._tentative
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
