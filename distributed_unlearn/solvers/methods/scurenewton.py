"""SCureNewton: stochastic cubic-regularised Newton steps, driven by scalars.

Bui et al., arXiv 2406.14507. We differ from the paper in the default inner solver (Krylov), in adapting M, and in that
every trial is measured before it is kept; `inner: gradient_descent` with `adaptive: false` is the paper's.
"""

from dataclasses import dataclass
from typing import Literal

from distributed_unlearn.solvers.inner.descent import DescentInner
from distributed_unlearn.solvers.inner.krylov import KrylovInner
from distributed_unlearn.solvers.inner.proposal import InnerSolver
from distributed_unlearn.solvers.inner.subspace import SubspaceInner
from distributed_unlearn.solvers.methods.cubic_newton import CubicNewton, CubicSettings
from distributed_unlearn.solvers.metric import AdamMetric
from distributed_unlearn.solvers.protocols import StepOracle


@dataclass(frozen=True)
class SCureNewtonSettings(CubicSettings):
    """How a step is taken; field for field the second-order part of the job file's solver section."""

    inner: Literal["krylov", "subspace", "gradient_descent"] = "krylov"
    metric: Literal["identity", "adam"] = "identity"
    max_krylov_steps: int = 3
    krylov_tolerance: float = 1e-2
    """Largest model residual over `||g||` that counts as solved; also judges gradient_descent's last iterate."""
    subspace_steps: int = 1
    """subspace: how many of the last accepted steps span it, beside the gradient."""
    subspace_gradient: Literal["whole", "by_role"] = "whole"
    """subspace: one direction, or one for the forget records and one for the retain records."""
    inner_steps: int = 10
    inner_learning_rate: float = 0.01
    perturbation: float = 1e-3

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: the names of all fields out of range.
        """
        wrong = [
            name
            for name, right in {
                "max_krylov_steps": self.max_krylov_steps >= 1,
                "krylov_tolerance": self.krylov_tolerance >= 0.0,
                "subspace_steps": self.subspace_steps >= 0,
                "inner_steps": self.inner_steps >= 1,
                "inner_learning_rate": self.inner_learning_rate > 0.0,
                "perturbation": self.perturbation >= 0.0,
            }.items()
            if not right
        ]
        if wrong:
            raise ValueError(f"got {', '.join(f'{name}={getattr(self, name)}' for name in wrong)}: out of range")
        super().__post_init__()


def _inner(oracle: StepOracle, settings: SCureNewtonSettings) -> InnerSolver:
    if settings.inner == "krylov":
        return KrylovInner(oracle, settings.max_krylov_steps, settings.krylov_tolerance)
    if settings.inner == "subspace":
        return SubspaceInner(oracle, settings.subspace_steps, settings.subspace_gradient == "by_role")
    return DescentInner(
        oracle,
        settings.inner_steps,
        settings.inner_learning_rate,
        settings.perturbation,
        settings.krylov_tolerance,
        limits_rate=settings.adaptive,
    )


class SCureNewton(CubicNewton):
    """Cubic steps from stochastic gradients and products."""

    def __init__(self, oracle: StepOracle, settings: SCureNewtonSettings) -> None:
        inner = _inner(oracle, settings)
        super().__init__(oracle, inner, settings, AdamMetric() if settings.metric == "adam" else None)
        self._descent = inner if isinstance(inner, DescentInner) else None

    def state_dict(self) -> dict[str, float]:
        """See `CubicNewton.state_dict`; with gradient descent also its learning rate."""
        rate = {} if self._descent is None else {"inner_learning_rate": self._descent.learning_rate}
        return {**super().state_dict(), **rate}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from another one's `state_dict`."""
        super().load_state_dict(state)
        if self._descent is not None:
            self._descent.learning_rate = state["inner_learning_rate"]
