"""CureNewton: cubic-regularised Newton steps with the Hessian written down and the dual solved exactly.

Bui et al., arXiv 2406.14507, for models of up to a few thousand trainable parameters. As in the paper M is fixed and
every finite step is kept, unless `adaptive`.
"""

from dataclasses import dataclass

from distributed_unlearn.solvers.inner.explicit import ExplicitCubicInner
from distributed_unlearn.solvers.methods.cubic_newton import CubicNewton, CubicSettings
from distributed_unlearn.solvers.protocols import StepOracle


@dataclass(frozen=True)
class CureNewtonSettings(CubicSettings):
    """How a step is taken; field for field the job file's."""

    adaptive: bool = False
    max_parameters: int = 5000
    """More trainable parameters than this are refused: the matrix would not fit."""


class CureNewton(CubicNewton):
    """Cubic steps with an explicit Hessian."""

    def __init__(self, oracle: StepOracle, settings: CureNewtonSettings) -> None:
        super().__init__(oracle, ExplicitCubicInner(oracle, settings.max_parameters), settings)
