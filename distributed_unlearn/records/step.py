"""Everything scalar about one outer step. Standard library only."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """Everything scalar about one outer step."""

    step: int
    loss: float
    gradient_norm: float
    alpha: float | None
    """Dual variable of the cubic model; equals `||Delta||` at its solution."""
    gamma: float | None
    """Implied damping `M alpha / 2`."""
    cubic_coefficient: float | None
    """M with which the accepted (or last) trial was computed."""
    update_norm: float
    """`||Delta||`; 0 when the step was rejected for good."""
    smallest_ritz_value: float | None
    largest_ritz_value: float | None
    residual: float | None
    """Cubic model's residual over `||g||`."""
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
