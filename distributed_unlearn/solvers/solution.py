"""What a cubic sub-problem solver returns: numbers, and one `Result` that says how it went and what to do about it."""

import enum
from dataclasses import dataclass


class Result(enum.Enum):
    """How an inner solve or a step ended; the value is a sentence with the cause and, where there is one, the cure.

    `StepRecord.result` stores the member's name.
    """

    successful = "The cubic model was minimised to the requested accuracy."
    hard_case = (
        "The gradient has (numerically) no component along the most negative curvature; an eigenvector component was "
        "added, and the minimiser is still exact. Nothing to do."
    )
    zero_gradient = (
        "The gradient is zero, so there is no direction to step in and the weights are unchanged. With the objective "
        "`retain` on a model that fits its data this is expected: choose an objective that uses the forget set."
    )
    krylov_exhausted = (
        "The Krylov space became invariant under the Hessian, so the step is exact and no further product can change "
        "it. Nothing to do."
    )
    max_krylov_steps = (
        "The Krylov space reached its largest dimension with the residual above krylov_tolerance; the step is the best "
        "one within the space. Raise max_krylov_steps (one product each) or krylov_tolerance to get `successful`."
    )
    max_inner_steps = (
        "All inner gradient-descent steps were taken with the residual above krylov_tolerance; the step is the last "
        "iterate. Raise inner_steps or, while nothing diverges, inner_learning_rate to get `successful`."
    )
    inner_not_descending = (
        "The inner gradient descent did not decrease the cubic model, so its iterate was not tried and the weights are "
        "unchanged. Lower inner_learning_rate below 1 / (largest curvature of the objective), or use the krylov solver."
    )
    negative_curvature = (
        "The system of the Newton step is not positive definite, so its solution is no minimiser of the quadratic "
        "model and may climb; it was taken all the same, as the method says. Raise solver.damping above the size of "
        "the most negative curvature, or use scurenewton or curenewton, whose model is bounded below."
    )
    max_cg_steps = (
        "Conjugate gradients used up max_cg_steps with the residual above cg_tolerance; the step is the last iterate. "
        "Raise solver.damping, max_cg_steps or cg_tolerance to get `successful`."
    )
    alpha_search_not_converged = (
        "The search for alpha used up its iterations, which no finite, symmetric problem should cause; the best "
        "bracketed value was used. Look at residual, and report the problem."
    )
    rejected = (
        "No trial reduced the objective enough within max_rejections, so the weights are unchanged. Usually the next "
        "minibatch works with the larger cubic coefficient; otherwise raise cubic_coefficient, max_rejections or the "
        "minibatch sizes."
    )
    nonfinite = (
        "A loss, gradient, curvature product or trial loss was NaN or infinite, and the weights are as they were "
        "before the step. Check the weights and the data for NaN, use float32, raise cubic_coefficient or, with "
        "gradient_descent, lower inner_learning_rate."
    )


@dataclass(frozen=True)
class CubicSolution:
    """Minimiser of `m(y) = g'y + 1/2 y'Hy + (M/6) ||y||^3` and what certifies it; all float64."""

    coefficients: tuple[float, ...]
    """`y` in the given basis; zeros when `result` is nonfinite."""
    alpha: float
    """Dual variable, `||y||` at the solution; 0 when nothing was solved."""
    gamma: float
    """Implied damping `M alpha / 2`."""
    predicted_reduction: float
    """`-m(y) = 1/2 y'(H + gamma I)y + (M/12) ||y||^3`, never negative."""
    residual_norm: float
    """`||g + H y + gamma y||`, with the coupling out of the Krylov space where that is known."""
    num_iterations: int
    """Newton or bisection iterations on the secular equation."""
    result: Result
    eigenvalues: tuple[float, ...]
    """Eigenvalues of `H` (Ritz values on a Krylov space), ascending; empty when `result` is nonfinite."""
