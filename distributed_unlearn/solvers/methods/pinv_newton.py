"""PINV-Newton: `Delta = -H^+ g` with the pseudo-inverse of an explicit Hessian.

A baseline of Bui et al., arXiv 2406.14507, where it moves even farther than a fixed damping (published: an update norm
of 3709): the smallest eigenvalue above the cut-off decides how far.
"""

from dataclasses import dataclass

from distributed_unlearn.solvers.inner.explicit import PseudoInverseInner
from distributed_unlearn.solvers.methods.newton_step import NewtonStep
from distributed_unlearn.solvers.protocols import StepOracle


@dataclass(frozen=True)
class PinvNewtonSettings:
    """How a step is taken; field for field the job file's."""

    cutoff: float = 1e-6
    """Eigenvalues of at most this share of the largest (in size) count as zero; near float32's noise in a product."""
    max_parameters: int = 5000
    """More trainable parameters than this are refused: the matrix would not fit."""


class PinvNewton(NewtonStep):
    """Newton steps with the pseudo-inverse."""

    def __init__(self, oracle: StepOracle, settings: PinvNewtonSettings) -> None:
        super().__init__(oracle, PseudoInverseInner(oracle, settings.cutoff, settings.max_parameters))
