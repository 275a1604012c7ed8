r"""The cubic sub-problem `min_y g'y + 1/2 y'Hy + (M/6) ||y||^3` by its one-dimensional dual, in float64.

The minimiser satisfies `(H + gamma I) y = -g`, `gamma = M alpha / 2`, `alpha = ||y||` and `H + gamma I >= 0`
(Nesterov and Polyak 2006, theorem 10). In the eigenbasis of `H` this is one scalar equation in `gamma`, the secular
equation. We solve it in the shift `t = gamma - max(0, -lambda_min)` instead of `gamma`: the eigenvalues of
`H + gamma I` are then `d_i + t` with `d_min` exactly 0 for indefinite `H`, so that a gradient component of 1e-12 (or
1e-200) along the most negative curvature, where `gamma` equals `-lambda_min` to all digits, loses no accuracy. Only a
component of exactly zero leaves a hard case to treat separately.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distributed_unlearn.solvers.solution import CubicSolution, Result

_EPSILON = torch.finfo(torch.float64).eps
_LARGEST = 1e90  # powers stay finite below; inner products of float32 vectors end near 1e85
_MAX_ITERATIONS = 200  # the monotone Newton iteration needs about 5 to 15; bisection alone stays under 200


@dataclass(frozen=True)
class SecularSolution:
    """Minimiser in the eigenbasis, with the dual variable."""

    coordinates: torch.Tensor
    """`s`, shape (n,), float64."""
    gamma: float
    alpha: float
    predicted_reduction: float
    num_iterations: int
    result: Result


def _norm(x: torch.Tensor) -> float:
    """Euclidean norm that neither overflows nor underflows in its squares."""
    largest = float(x.abs().max())
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(x / largest))


def _usable(x: torch.Tensor) -> bool:
    return bool((x.abs() <= _LARGEST).all())  # False for NaN


def _coordinates(distances: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """`s_i = -b_i / (d_i + t)`, and 0 where `b_i` is exactly 0 (also when `d_i + t` is)."""
    return torch.where(b == 0.0, torch.zeros_like(b), -b / (distances + t))


def _initial_bracket(distances: torch.Tensor, b: torch.Tensor, floor: float, coefficient: float) -> tuple[float, float]:
    """`t_lo <= t <= t_hi` around the root, from one component and from the whole norm.

    `|b_i| / (d_i + t) <= ||s|| = 2 (floor + t) / M` for every i gives the lower end and
    `||s|| <= ||b|| / (d_min + t)` the upper one; both are quadratics in t, solved without cancellation.
    `t_lo = 0` means that no single component excludes the hard case.
    """
    if not bool((b != 0.0).any()):
        return 0.0, 0.0
    c = 0.5 * coefficient * b.abs()
    roots = 2.0 * (c - distances * floor) / ((distances + floor) + torch.sqrt((distances - floor) ** 2 + 4.0 * c))
    lower = max(0.0, float(roots[c > 0.0].max()))
    c_norm, smallest = 0.5 * coefficient * _norm(b), float(distances[0])
    upper = 2.0 * c_norm / (smallest + floor + math.hypot(smallest + floor, 2.0 * math.sqrt(c_norm)))
    return lower, max(upper, lower)


def _secular_root(
    distances: torch.Tensor, b: torch.Tensor, floor: float, coefficient: float, start: float, upper: float
) -> tuple[float, int, bool]:
    """The root t of `phi(t) = 1/||s(t)|| - M / (2 (floor + t))`, iterations used, and whether it converged.

    `phi` is concave and increasing, so Newton from the left of the root converges monotonically; the bracket and its
    bisection catch what rounding may do to that (Conn, Gould, Toint 2000, section 7.3.3; the cubic form is Cartis,
    Gould, Toint 2011, section 6.1).
    """
    lo, hi, t = start, upper, start
    for iteration in range(1, _MAX_ITERATIONS + 1):
        s = _coordinates(distances, b, t)
        norm, gamma = _norm(s), floor + t
        if norm == 0.0 or hi <= lo:
            return t, iteration, True
        if gamma == 0.0:  # the lower end underflowed; the root is above it
            t = hi
            continue
        phi = 1.0 / norm - 0.5 * coefficient / gamma
        if abs(phi) <= 2.0 * _EPSILON / norm:
            return t, iteration, True
        if phi < 0.0:
            lo = t
        else:
            hi = t
        weights = torch.where(b == 0.0, torch.zeros_like(b), (s / norm) ** 2 / (distances + t))
        squared = gamma**2
        slope = float(weights.sum()) / norm + (0.5 * coefficient / squared if squared > 0.0 else math.inf)
        candidate = t - phi / slope if slope < math.inf else lo  # the end makes it bisect
        if slope < math.inf and abs(candidate - t) <= 2.0 * _EPSILON * t:
            return t, iteration, True
        if not lo < candidate < hi:
            candidate = math.sqrt(lo) * math.sqrt(hi) if lo > 0.0 else 0.5 * hi
            if not lo < candidate < hi:  # neighbouring floats
                return t, iteration, True
        t = candidate
    return t, _MAX_ITERATIONS, False


def solve_secular(
    eigenvalues: torch.Tensor, rotated_gradient: torch.Tensor, cubic_coefficient: float
) -> SecularSolution:
    """Minimise `b's + 1/2 sum_i lambda_i s_i^2 + (M/6) ||s||^3`, the cubic model in the eigenbasis of `H`.

    In the hard case (`||s|| < alpha` at `gamma = -lambda_min`) the component along the first eigenvector is filled up
    to `||s|| = alpha`; either sign is a global minimiser, ours is positive.

    Args:
        eigenvalues: shape (n,), n >= 1, float64, ascending.
        rotated_gradient: `b = V'g`, shape (n,), float64.
        cubic_coefficient: `M > 0`.

    Returns:
        The global minimiser with `result` successful, hard_case, zero_gradient (`b = 0`, `H >= 0`: `s = 0`) or
        alpha_search_not_converged; nonfinite and zeros where a number is NaN or above 1e90 in size.
    """
    if not (_usable(eigenvalues) and _usable(rotated_gradient)):
        return SecularSolution(torch.zeros_like(rotated_gradient), 0.0, 0.0, math.nan, 0, Result.nonfinite)
    floor = max(0.0, -float(eigenvalues[0]))
    b = torch.where(0.5 * cubic_coefficient * rotated_gradient.abs() > 0.0, rotated_gradient, 0.0)  # no underflow below
    distances = eigenvalues + floor if floor == 0.0 else eigenvalues - eigenvalues[0]
    result, iterations, t = Result.successful, 0, 0.0
    start, upper = _initial_bracket(distances, b, floor, cubic_coefficient)
    radius = 2.0 * floor / cubic_coefficient
    s = torch.zeros_like(b) if start > 0.0 else _coordinates(distances, b, 0.0)
    missing = radius - _norm(s)
    if start == 0.0 and missing >= 0.0:
        if floor > 0.0:
            # sqrt((r - n)(r + n)) keeps the digits that r^2 - n^2 loses
            s[0] = math.sqrt(missing) * math.sqrt(2.0 * radius - missing)
            result = Result.hard_case
        elif not bool((b != 0.0).any()):
            result = Result.zero_gradient
    else:
        t, iterations, converged = _secular_root(distances, b, floor, cubic_coefficient, start, upper)
        s = _coordinates(distances, b, t)
        if not converged:
            result = Result.alpha_search_not_converged
        elif t <= 4.0 * _EPSILON * floor:
            result = Result.hard_case
    gamma = floor + t
    alpha = 2.0 * gamma / cubic_coefficient
    predicted = 0.5 * float(((distances + t) * s * s).sum()) + gamma * alpha**2 / 6.0
    return SecularSolution(s, gamma, alpha, predicted, iterations, result)


def _failed(n: int) -> CubicSolution:
    return CubicSolution((0.0,) * n, 0.0, 0.0, 0.0, math.nan, 0, Result.nonfinite, ())


def _solve(hessian: torch.Tensor, gradient: torch.Tensor, coefficient: float, coupling: float) -> CubicSolution:
    """Shared end of both entries: finiteness, eigendecomposition, secular equation, residual in the given basis."""
    n = gradient.numel()
    if not (_usable(hessian) and _usable(gradient) and abs(coupling) <= _LARGEST):
        return _failed(n)
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    eigenvalues = _without_rounding(eigenvalues)
    inner = solve_secular(eigenvalues, vectors.T @ gradient, coefficient)
    if inner.result is Result.nonfinite:
        return _failed(n)
    y = vectors @ inner.coordinates
    residual = _norm(gradient + hessian @ y + inner.gamma * y)
    return CubicSolution(
        coefficients=tuple(y.tolist()),
        alpha=inner.alpha,
        gamma=inner.gamma,
        predicted_reduction=inner.predicted_reduction,
        residual_norm=math.hypot(residual, coupling * float(y[-1])),
        num_iterations=inner.num_iterations,
        result=inner.result,
        eigenvalues=tuple(eigenvalues.tolist()),
    )


def _without_rounding(eigenvalues: torch.Tensor) -> torch.Tensor:
    """An eigenvalue that rounding alone may have made negative is zero: a singular positive H is no hard case."""
    rounding = eigenvalues.numel() * _EPSILON * float(eigenvalues.abs().max())
    return torch.where((eigenvalues < 0.0) & (eigenvalues >= -rounding), 0.0, eigenvalues)


def solve_cubic_spectrum(
    eigenvalues: torch.Tensor, rotated_gradient: torch.Tensor, cubic_coefficient: float
) -> CubicSolution:
    """Minimise the cubic model in the eigenbasis of `H`, which is known: no decomposition, O(n).

    Args:
        eigenvalues: shape (n,), n >= 1, ascending, float64.
        rotated_gradient: `V'g`, shape (n,), float64.
        cubic_coefficient: `M > 0`.

    Returns:
        The global minimiser with coefficients in the eigenbasis; NaN or more than 1e90 in gives `Result.nonfinite`.

    Raises:
        ValueError: `M` not positive.
    """
    _check_coefficient(cubic_coefficient)
    if not (_usable(eigenvalues) and _usable(rotated_gradient)):
        return _failed(eigenvalues.numel())
    kept = _without_rounding(eigenvalues)
    inner = solve_secular(kept, rotated_gradient, cubic_coefficient)
    return CubicSolution(
        coefficients=tuple(inner.coordinates.tolist()),
        alpha=inner.alpha,
        gamma=inner.gamma,
        predicted_reduction=inner.predicted_reduction,
        residual_norm=_norm(rotated_gradient + (kept + inner.gamma) * inner.coordinates),
        num_iterations=inner.num_iterations,
        result=inner.result,
        eigenvalues=tuple(kept.tolist()),
    )


def solve_cubic_tridiagonal(
    diagonal: Sequence[float], off_diagonal: Sequence[float], gradient_norm: float, cubic_coefficient: float
) -> CubicSolution:
    """Minimise the cubic model on a Krylov space: `H = T` tridiagonal, `g = gradient_norm * e_1`.

    Args:
        diagonal: the m >= 1 values `<q_j, H q_j>`.
        off_diagonal: `beta_1 .. beta_{m-1}`, or `beta_1 .. beta_m`: the last one couples the space to the rest, and
            `residual_norm` then includes its `beta_m |y_m|`, the residual in the full space.
        gradient_norm: `||g|| >= 0`.
        cubic_coefficient: `M > 0`.

    Returns:
        The global minimiser in the Lanczos basis; NaN or more than 1e90 in gives `Result.nonfinite` and zeros.

    Raises:
        ValueError: lengths that do not fit, or `M` not positive.
    """
    m = len(diagonal)
    if m == 0 or len(off_diagonal) not in (m - 1, m):
        raise ValueError(f"got {m} diagonal and {len(off_diagonal)} off-diagonal entries; expected m, and m-1 or m")
    _check_coefficient(cubic_coefficient)
    matrix = torch.diag(torch.tensor(list(diagonal), dtype=torch.float64))
    if m > 1:
        beta = torch.diag(torch.tensor(list(off_diagonal[: m - 1]), dtype=torch.float64), 1)
        matrix = matrix + beta + beta.T
    gradient = torch.zeros(m, dtype=torch.float64)
    gradient[0] = gradient_norm
    return _solve(matrix, gradient, cubic_coefficient, off_diagonal[-1] if len(off_diagonal) == m else 0.0)


def solve_cubic_dense(hessian: torch.Tensor, gradient: torch.Tensor, cubic_coefficient: float) -> CubicSolution:
    """Minimise the cubic model with an explicit Hessian (CureNewton): one eigendecomposition, O(n^3).

    Args:
        hessian: shape (n, n), symmetric; any floating dtype, computed in float64.
        gradient: shape (n,).
        cubic_coefficient: `M > 0`.

    Returns:
        The global minimiser; NaN or more than 1e90 in gives `Result.nonfinite` and zeros.

    Raises:
        ValueError: shapes that do not fit, a matrix that is not symmetric to 1e-6 of its largest entry, or `M` not
            positive.
    """
    n = gradient.numel()
    if n == 0 or gradient.dim() != 1 or tuple(hessian.shape) != (n, n):
        raise ValueError(f"got shapes {tuple(hessian.shape)} and {tuple(gradient.shape)}; expected (n, n) and (n,)")
    _check_coefficient(cubic_coefficient)
    matrix = hessian.detach().to("cpu", torch.float64)
    asymmetry, largest = float((matrix - matrix.T).abs().max()), float(matrix.abs().max())
    if asymmetry > 1e-6 * largest:  # False for NaN, which becomes Result.nonfinite
        raise ValueError(f"got a matrix with asymmetry {asymmetry:.3g}; expected a symmetric one")
    return _solve(0.5 * (matrix + matrix.T), gradient.detach().to("cpu", torch.float64), cubic_coefficient, 0.0)


def _check_coefficient(cubic_coefficient: float) -> None:
    if not (cubic_coefficient > 0.0 and math.isfinite(cubic_coefficient)):
        raise ValueError(f"got cubic_coefficient {cubic_coefficient}; expected a positive finite number")
