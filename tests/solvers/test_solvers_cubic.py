"""The cubic sub-problem against hand-worked answers, its optimality conditions and a brute-force minimisation."""

import math

import pytest
import torch

from distributed_unlearn.solvers.cubic import (
    solve_cubic_dense,
    solve_cubic_spectrum,
    solve_cubic_tridiagonal,
    solve_secular,
)
from distributed_unlearn.solvers.solution import CubicSolution, Result


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_orthogonal(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def rotated(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    q = random_orthogonal(len(eigenvalues), seed)
    return (q * eigenvalues) @ q.T


def gradient(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_value(h: torch.Tensor, g: torch.Tensor, coefficient: float, y: torch.Tensor) -> float:
    return float(g @ y + 0.5 * y @ h @ y + coefficient / 6 * y.norm() ** 3)


def check_optimality(h: torch.Tensor, g: torch.Tensor, coefficient: float, solution: CubicSolution) -> None:
    """Necessary and sufficient for a global minimiser (Nesterov and Polyak 2006, theorem 10)."""
    y = torch.tensor(solution.coefficients, dtype=torch.float64)
    scale = float(torch.linalg.matrix_norm(h, 2)) + solution.gamma
    residual = float((g + h @ y + solution.gamma * y).norm())
    assert solution.gamma == pytest.approx(coefficient * solution.alpha / 2, rel=1e-14)
    assert float(y.norm()) == pytest.approx(solution.alpha, rel=1e-9), (float(y.norm()), solution.alpha)
    assert residual <= 1e-12 * (float(g.norm()) + scale * float(y.norm())), residual
    assert float(torch.linalg.eigvalsh(h)[0]) + solution.gamma >= -1e-13 * scale
    assert solution.predicted_reduction >= 0.0
    value = model_value(h, g, coefficient, y)
    magnitude = float(g.norm() * y.norm()) + scale * float(y.norm()) ** 2
    assert solution.predicted_reduction == pytest.approx(-value, rel=1e-9, abs=1e-13 * magnitude)
    assert solution.residual_norm == pytest.approx(residual, abs=1e-12 * (float(g.norm()) + scale * float(y.norm())))


TABLE = {
    "identity": (torch.eye(5, dtype=torch.float64), gradient(5)),
    "diagonal": (torch.diag(vector(0.5, 1, 2, 4, 8)), gradient(5)),
    "conditioned_1e6": (rotated(torch.logspace(-3, 3, 6, dtype=torch.float64)), gradient(6)),
    "singular": (rotated(vector(0, 0, 1, 2)), gradient(4)),
    "indefinite": (rotated(vector(-3, -1, 0, 1, 5)), gradient(5)),
    "negative": (rotated(vector(-3, -2, -1)), gradient(3)),
    "zero_hessian": (torch.zeros(3, 3, dtype=torch.float64), gradient(3)),
    "scalar": (vector(-2.0)[:, None], vector(0.3)),
    "hard_exact": (torch.diag(vector(-1, 1, 2)), vector(0, 1, 1)),
    "hard_double": (torch.diag(vector(-1, -1, 2)), vector(0, 0, 1)),
    "hard_rotated": (rotated(vector(-1, 1, 2), 3), random_orthogonal(3, 3) @ vector(0, 1, 1)),
    "hard_near": (torch.diag(vector(-1, 1, 2)), vector(1e-12, 1, 1)),
    "hard_nearer": (torch.diag(vector(-1, 1, 2)), vector(1e-200, 1, 1)),
    "orthogonal_not_hard": (torch.diag(vector(-0.1, 1, 2)), vector(0, 1, 1)),
    "large_gradient": (rotated(vector(-1, 1, 3)), 1e8 * gradient(3)),
    "tiny_gradient": (rotated(vector(-1, 1, 3)), 1e-12 * gradient(3)),
    "tiny_gradient_convex": (rotated(vector(1, 2, 3)), 1e-12 * gradient(3)),
    "wide_spectrum": (torch.diag(vector(1e-8, 1e-4, 1, 1e4, 1e8)), gradient(5)),
    "wide_indefinite": (torch.diag(vector(-1e8, -1e-8, 1e-8, 1e8)), gradient(4)),
    "tiny_spectrum": (rotated(vector(-1e-8, 1e-8, 2e-8)), gradient(3)),
}


@pytest.mark.parametrize("coefficient", [1e-3, 1.0, 100.0, 1e6])
@pytest.mark.parametrize("name", TABLE)
def test_table_is_optimal(name: str, coefficient: float) -> None:
    h, g = TABLE[name]
    solution = solve_cubic_dense(h, g, coefficient)
    assert solution.result in (Result.successful, Result.hard_case)
    assert solution.num_iterations < 60
    check_optimality(h, g, coefficient, solution)


def test_scales_everywhere() -> None:
    """Eigenvalues 1e-8 to 1e8, gradients 1e-12 to 1e8, M 1e-8 to 1e12: always optimal, never many iterations."""
    worst = 0
    for exponent in (-8, -4, 0, 4, 8):
        for gradient_exponent in (-12, -6, 0, 8):
            for coefficient in (1e-8, 1.0, 1e12):
                for eigenvalues in (vector(1, 2, 3), vector(-1, 0.5, 2), vector(0, 0, 1)):
                    h, g = rotated(eigenvalues * 10.0**exponent), gradient(3) * 10.0**gradient_exponent
                    solution = solve_cubic_dense(h, g, coefficient)
                    check_optimality(h, g, coefficient, solution)
                    worst = max(worst, solution.num_iterations)
    assert worst < 80


def brute_force(h: torch.Tensor, g: torch.Tensor, coefficient: float, num_starts: int = 12) -> float:
    """Smallest value of the cubic model found by L-BFGS from random starts of many lengths; knows no dual."""
    generator, best = torch.Generator().manual_seed(5), math.inf
    for start in range(num_starts):
        y = torch.randn(len(g), generator=generator, dtype=torch.float64) * 10.0 ** (start % 4 - 2)
        y.requires_grad_()
        optimiser = torch.optim.LBFGS([y], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def closure(y: torch.Tensor = y, optimiser: torch.optim.LBFGS = optimiser) -> torch.Tensor:
            optimiser.zero_grad()
            value = g @ y + 0.5 * y @ h @ y + coefficient / 6 * y.norm() ** 3
            value.backward()
            return value

        optimiser.step(closure)
        best = min(best, model_value(h, g, coefficient, y.detach()))
    return best


@pytest.mark.parametrize("name", ["identity", "singular", "indefinite", "negative", "hard_exact", "hard_near"])
def test_no_restart_beats_it(name: str) -> None:
    h, g = TABLE[name]
    solution = solve_cubic_dense(h, g, 2.0)
    assert -solution.predicted_reduction == pytest.approx(brute_force(h, g, 2.0), rel=1e-8)


def test_hand_worked() -> None:
    # M = 2, so gamma = alpha. H = diag(1, 3) and gamma = 1 give H + gamma I = diag(2, 4); y = -(0.6, 0.8) has norm 1,
    # so g = -(H + gamma I) y = (1.2, 3.2). m(y) = -(0.72 + 2.56) + (0.36 + 1.92)/2 + 2/6 = -1.80666...
    solution = solve_cubic_dense(torch.diag(vector(1, 3)), vector(1.2, 3.2), 2.0)
    assert solution.coefficients == pytest.approx((-0.6, -0.8), rel=1e-13)
    assert (solution.alpha, solution.gamma) == pytest.approx((1.0, 1.0), rel=1e-13)
    assert solution.predicted_reduction == pytest.approx(3.28 - 1.14 - 1 / 3, rel=1e-13)
    assert solution.result is Result.successful


def test_hand_worked_hard_case() -> None:
    # M = 2, H = diag(-1, 1), g = (0, 1). gamma >= 1; at gamma = 1 y_2 = -1/2 has norm 1/2 < alpha = 1, so
    # y_1 = sqrt(1 - 1/4). m(y) = -1/2 + (-3/4 + 1/4)/2 + 1/3 = -5/12.
    solution = solve_cubic_dense(torch.diag(vector(-1, 1)), vector(0, 1), 2.0)
    assert solution.coefficients == pytest.approx((math.sqrt(0.75), -0.5), rel=1e-14)
    assert solution.predicted_reduction == pytest.approx(5 / 12, rel=1e-14)
    assert solution.result is Result.hard_case


@pytest.mark.parametrize("component", [1e-6, 1e-9, 1e-12, 1e-16, 1e-100, 1e-300])
def test_near_hard_case_keeps_its_digits(component: float) -> None:
    """As the component along the negative curvature vanishes, the solution tends to the exact hard case's."""
    solution = solve_cubic_dense(torch.diag(vector(-1, 1)), vector(component, 1), 2.0)
    # first order in the component: t = component / y_1
    assert solution.coefficients[0] == pytest.approx(-math.sqrt(0.75), rel=2 * component + 1e-13)
    assert solution.coefficients[1] == pytest.approx(-0.5, rel=2 * component + 1e-13)
    assert solution.result is (Result.hard_case if component < 1e-15 else Result.successful)


def test_zero_gradient() -> None:
    factor = gradient(12).view(4, 3)
    flat = solve_cubic_dense(factor @ factor.T, torch.zeros(4, dtype=torch.float64), 3.0)  # singular up to rounding
    assert flat.result is Result.zero_gradient
    assert flat.coefficients == (0.0,) * 4 and flat.alpha == 0.0 and flat.predicted_reduction == 0.0
    # Pure eigenvector step of length 2 |lambda| / M = 4; m = -2 * 16 / 2 + 64/6 = -16/3.
    down = solve_cubic_dense(torch.diag(vector(-2, 5)), torch.zeros(2, dtype=torch.float64), 1.0)
    assert down.result is Result.hard_case
    assert down.coefficients == pytest.approx((4.0, 0.0)) and down.predicted_reduction == pytest.approx(16 / 3)


@pytest.mark.parametrize("eigenvalues", [(1e300, 1e300), (-1e300, 1.0), (1.0, 1e300), (1.0, 1e91)])
def test_numbers_that_no_float_can_square_are_refused(eigenvalues: tuple[float, ...]) -> None:
    """A float32 product has no such entries: they are treated like infinity, and nothing divides by zero."""
    for b in (vector(1, 1), vector(0, 1), vector(1e-12, 1e8)):
        inner = solve_secular(vector(*eigenvalues), b, 1.0)
        assert inner.result is Result.nonfinite and not inner.coordinates.any()
        assert solve_cubic_dense(torch.diag(vector(*eigenvalues)), b, 1.0).result is Result.nonfinite


@pytest.mark.parametrize("eigenvalues", [(1e90, 1e90), (-1e90, 1e90), (-1.0, 1e90), (1e88, 1e89)])
@pytest.mark.parametrize("coefficient", [1e-8, 1.0, 1e12])
def test_the_largest_numbers_are_solved(eigenvalues: tuple[float, ...], coefficient: float) -> None:
    for b in (vector(1, 1), vector(0, 1), vector(1e90, 1), vector(1e-200, 1e-200), vector(1e-12, 1e8)):
        inner = solve_secular(vector(*eigenvalues), b, coefficient)
        assert inner.result in (Result.successful, Result.hard_case)
        shifted = vector(*eigenvalues) + inner.gamma
        # (lambda + gamma) s = -b but for the first entry in the hard case, where lambda + gamma is 0
        wrong = (shifted * inner.coordinates + b).abs() / (b.abs() + 1e-300)
        assert float(wrong[1]) < 1e-9 and math.isfinite(inner.predicted_reduction)
        assert inner.alpha == pytest.approx(float(inner.coordinates.abs().max()), rel=0.5)


def test_the_spectrum_is_enough() -> None:
    h, g = TABLE["indefinite"]
    eigenvalues, vectors = torch.linalg.eigh(h)
    dense, known = solve_cubic_dense(h, g, 2.0), solve_cubic_spectrum(eigenvalues, vectors.T @ g, 2.0)
    assert torch.allclose(vectors @ vector(*known.coefficients), vector(*dense.coefficients), rtol=1e-12)
    assert (known.alpha, known.predicted_reduction) == pytest.approx((dense.alpha, dense.predicted_reduction))
    assert known.residual_norm < 1e-12 and known.eigenvalues == pytest.approx(dense.eigenvalues)
    assert solve_cubic_spectrum(eigenvalues * math.nan, g, 2.0).result is Result.nonfinite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_input_is_refused(bad: float) -> None:
    h = torch.eye(2, dtype=torch.float64)
    for solution in (
        solve_cubic_dense(h, vector(1, bad), 1.0),
        solve_cubic_dense(h * bad, vector(1, 1), 1.0),
        solve_cubic_tridiagonal([1.0, bad], [0.5], 1.0, 1.0),
        solve_cubic_tridiagonal([1.0, 1.0], [bad], 1.0, 1.0),
        solve_cubic_tridiagonal([1.0, 1.0], [0.5, bad], 1.0, 1.0),
        solve_cubic_tridiagonal([1.0, 1.0], [0.5], bad, 1.0),
    ):
        assert solution.result is Result.nonfinite
        assert solution.coefficients == (0.0, 0.0) and solution.predicted_reduction == 0.0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        solve_cubic_dense(torch.tensor([[1.0, 2.0], [-2.0, 1.0]]), vector(1, 1), 1.0)
    with pytest.raises(ValueError, match="cubic_coefficient"):
        solve_cubic_dense(torch.eye(2), vector(1, 1), 0.0)
    with pytest.raises(ValueError, match="shapes"):
        solve_cubic_dense(torch.eye(3), vector(1, 1), 1.0)
    with pytest.raises(ValueError, match="off-diagonal"):
        solve_cubic_tridiagonal([1.0, 2.0], [], 1.0, 1.0)


def test_tridiagonal_equals_dense() -> None:
    diagonal, off = [1.0, -2.0, 0.5, 3.0], [0.7, 0.2, 1.1]
    t = torch.diag(vector(*diagonal)) + torch.diag(vector(*off), 1) + torch.diag(vector(*off), -1)
    g = vector(1.7, 0, 0, 0)
    dense, closed = solve_cubic_dense(t, g, 5.0), solve_cubic_tridiagonal(diagonal, off, 1.7, 5.0)
    assert closed.coefficients == pytest.approx(dense.coefficients, rel=1e-12)
    check_optimality(t, g, 5.0, closed)
    coupled = solve_cubic_tridiagonal(diagonal, [*off, 0.3], 1.7, 5.0)
    assert coupled.coefficients == closed.coefficients
    assert coupled.residual_norm == pytest.approx(0.3 * abs(closed.coefficients[-1]), rel=1e-9)


def test_dual_value_equals_primal_value() -> None:
    """Strong duality: -m(y) = 1/2 <(H + gamma I)^-1 g, g> + (M/12) alpha^3."""
    h, g = TABLE["indefinite"]
    solution = solve_cubic_dense(h, g, 7.0)
    inverse = torch.linalg.solve(h + solution.gamma * torch.eye(5, dtype=torch.float64), g)
    assert solution.predicted_reduction == pytest.approx(float(inverse @ g) / 2 + 7 / 12 * solution.alpha**3, rel=1e-10)


def test_iteration_limit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_unlearn.solvers.cubic._MAX_ITERATIONS", 1)
    solution = solve_secular(vector(-1, 1, 3), vector(1, 1, 1), 2.0)
    assert solution.result is Result.alpha_search_not_converged
    assert torch.isfinite(solution.coordinates).all()


def test_every_result_explains_itself() -> None:
    assert len({member.value for member in Result}) == len(Result)
    assert all(member.value.endswith(".") or "`" in member.value for member in Result)
