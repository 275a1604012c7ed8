"""Damped Newton: `Delta = -(H + gamma I)^-1 g` with a fixed gamma, by conjugate gradients.

A baseline of Bui et al., arXiv 2406.14507, where it moves far too much (published: an update norm of 839 against 0.36
of the cubic step): a fixed damping suits one curvature, and the Hessian of a trained network is degenerate.
"""

from dataclasses import dataclass

from distributed_unlearn.solvers.inner.conjugate_gradients import ConjugateGradientsInner
from distributed_unlearn.solvers.methods.newton_step import NewtonStep
from distributed_unlearn.solvers.protocols import StepOracle


@dataclass(frozen=True)
class DampedNewtonSettings:
    """How a step is taken; field for field the job file's."""

    damping: float = 1e-2
    """gamma."""
    max_cg_steps: int = 50
    cg_tolerance: float = 1e-3
    """Largest residual over `||g||` that counts as solved."""


class DampedNewton(NewtonStep):
    """Newton steps with a fixed damping."""

    def __init__(self, oracle: StepOracle, settings: DampedNewtonSettings) -> None:
        inner = ConjugateGradientsInner(oracle, settings.damping, settings.max_cg_steps, settings.cg_tolerance)
        super().__init__(oracle, inner)
