"""Everything scalar about one outer step. Standard library only."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """Everything scalar about one outer step."""

    step: int
    loss: float
    gradient_norm: float
    """`||g||`, Euclidean."""
    alpha: float | None
    """Dual variable of the cubic model; equals `||Delta||` at its solution, in the metric's norm where there is one."""
    gamma: float | None
    """Implied damping `M alpha / 2`, or the fixed one."""
    cubic_coefficient: float | None
    """M with which the accepted (or last) trial was computed."""
    update_norm: float | None
    """`||Delta||`, Euclidean, of what was applied; None when nothing was."""
    smallest_ritz_value: float | None
    largest_ritz_value: float | None
    residual: float | None
    """The model's residual over `||g||`, both in the metric's norm."""
    predicted_reduction: float | None
    actual_reduction: float | None
    acceptance_ratio: float | None
    accepted: bool
    num_rejections: int
    num_krylov_steps: int
    num_products: int
    result: str
    """Name of the inner solver's `Result` member."""
    wall_seconds: float
    terms: dict[str, float] = field(default_factory=dict)
    """Objective parts at the start of the step."""
