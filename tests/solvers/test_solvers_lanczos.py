"""The Lanczos basis and the inner descent against dense matrices."""

import math
from collections.abc import Sequence

import pytest
import torch
from memory_oracle import LocalSpace

from distributed_unlearn.solvers.cubic import solve_cubic_dense, solve_cubic_tridiagonal
from distributed_unlearn.solvers.inner.descent import InnerDescent
from distributed_unlearn.solvers.inner.krylov import LanczosBasis


def symmetric(n: int, seed: int = 0) -> torch.Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.T) / 2


def start(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tridiagonal(diagonal: list[float], off: list[float]) -> torch.Tensor:
    t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    beta = torch.diag(torch.tensor(off[: len(diagonal) - 1], dtype=torch.float64), 1)
    return t + beta + beta.T


def grow(basis: LanczosBasis, num_steps: int) -> tuple[list[float], list[float]]:
    entries = [basis.extend() for _ in range(num_steps)]
    return [e.diagonal for e in entries], [e.off_diagonal for e in entries]


def test_small_space_against_dense() -> None:
    h, space = symmetric(30), LocalSpace()
    basis = LanczosBasis(space, lambda v: h @ v, start(30))
    diagonal, off = grow(basis, 6)
    q = torch.stack(basis.vectors[:6])
    assert torch.allclose(q @ q.T, torch.eye(6, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(q @ h @ q.T, tridiagonal(diagonal, off), atol=1e-13)
    assert off[-1] == pytest.approx(float((h @ q[5] - q.T @ (q @ (h @ q[5]))).norm()), rel=1e-12)
    assert torch.allclose(basis.vectors[6] @ h @ q[5], torch.tensor(off[-1], dtype=torch.float64), rtol=1e-12)
    assert space.num_reductions == 1 + 2 * 6
    assert torch.allclose(q[0], start(30) / start(30).norm())


def test_wrong_sign_operator_gives_another_matrix() -> None:
    h = symmetric(10)
    diagonal, off = grow(LanczosBasis(LocalSpace(), lambda v: -(h @ v), start(10)), 4)
    right, right_off = grow(LanczosBasis(LocalSpace(), lambda v: h @ v, start(10)), 4)
    assert diagonal == pytest.approx([-d for d in right]) and off == pytest.approx(right_off)


def test_full_space_reproduces_eigenvalues_and_the_cubic_step() -> None:
    h, g = symmetric(12), start(12)
    basis = LanczosBasis(LocalSpace(), lambda v: h @ v, g)
    diagonal, off = grow(basis, 12)
    assert off[-1] == 0.0 and basis.exhausted
    assert torch.allclose(torch.linalg.eigvalsh(tridiagonal(diagonal, off)), torch.linalg.eigvalsh(h), atol=1e-13)
    krylov = solve_cubic_tridiagonal(diagonal, off, float(g.norm()), 3.0)
    dense = solve_cubic_dense(h, g, 3.0)
    update = basis.combine(krylov.coefficients)
    assert torch.allclose(update, torch.tensor(dense.coefficients, dtype=torch.float64), atol=1e-11)
    assert krylov.predicted_reduction == pytest.approx(dense.predicted_reduction, rel=1e-12)


def test_residual_estimate_is_the_true_residual() -> None:
    h, g = symmetric(40), start(40)
    basis = LanczosBasis(LocalSpace(), lambda v: h @ v, g)
    diagonal, off = grow(basis, 5)
    solution = solve_cubic_tridiagonal(diagonal, off, float(g.norm()), 10.0)
    update = basis.combine(solution.coefficients)
    true = float((g + h @ update + solution.gamma * update).norm())
    assert solution.residual_norm == pytest.approx(true, rel=1e-10) and true > 1e-3


def test_float32_stays_orthogonal() -> None:
    eigenvalues = torch.logspace(-6, 3, 300, dtype=torch.float64)  # ill-conditioned: plain Lanczos loses orthogonality
    h = torch.diag(eigenvalues).float()
    basis = LanczosBasis(LocalSpace(), lambda v: h @ v, start(300).float())
    grow(basis, 60)
    q = torch.stack(basis.vectors).double()
    assert float((q @ q.T - torch.eye(61, dtype=torch.float64)).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_breakdown(dtype: torch.dtype) -> None:
    h = torch.diag(torch.tensor([1, 1, 1, 4, 4, -2], dtype=dtype))  # three distinct eigenvalues
    basis = LanczosBasis(LocalSpace(), lambda v: h @ v, start(6).to(dtype))
    diagonal, off = grow(basis, 3)
    assert off[-1] == 0.0 and min(off[:-1]) > 0.1
    ritz = torch.linalg.eigvalsh(tridiagonal(diagonal, off))
    assert ritz.tolist() == pytest.approx([-2, 1, 4], rel=1e-5)
    with pytest.raises(RuntimeError, match="dimension 3 is exhausted"):
        basis.extend()
    assert len(basis.vectors) == 3


class CoarseSpace(LocalSpace):
    """The first pass of every extension sees coefficients that are 1 % off, as from a poor reduction."""

    def dots(self, rows: Sequence[torch.Tensor], x: torch.Tensor) -> list[float]:
        values = super().dots(rows, x)
        return [1.01 * value for value in values] if self.num_reductions % 2 == 0 else values


def test_second_pass_repairs_the_first() -> None:
    """Also `beta`: its norm must not include what the second pass takes away."""
    h = symmetric(30)
    diagonal, off = grow(LanczosBasis(LocalSpace(), lambda v: h @ v, start(30)), 5)
    coarse = LanczosBasis(CoarseSpace(), lambda v: h @ v, start(30))
    coarse_diagonal, coarse_off = grow(coarse, 5)
    assert coarse_diagonal == pytest.approx(diagonal, rel=1e-10) and coarse_off == pytest.approx(off, rel=1e-10)
    q = torch.stack(coarse.vectors)
    assert torch.allclose(q @ q.T, torch.eye(6, dtype=torch.float64), atol=1e-12)


def test_zero_hessian_breaks_down_at_once() -> None:
    basis = LanczosBasis(LocalSpace(), torch.zeros_like, start(4))
    entry = basis.extend()
    assert (entry.diagonal, entry.off_diagonal) == (0.0, 0.0)


def test_nonfinite_product_closes_the_space() -> None:
    basis = LanczosBasis(LocalSpace(), lambda v: v * math.nan, start(4))
    entry = basis.extend()
    assert math.isnan(entry.diagonal) and math.isnan(entry.off_diagonal)
    with pytest.raises(RuntimeError):
        basis.extend()


def test_operator_output_is_not_modified() -> None:
    h, buffer = symmetric(8), torch.empty(8, dtype=torch.float64)

    def operator(v: torch.Tensor) -> torch.Tensor:
        torch.mv(h, v, out=buffer)
        return buffer

    g = start(8)
    basis = LanczosBasis(LocalSpace(), operator, g)
    basis.extend()
    assert torch.equal(buffer, h @ basis.vectors[0]) and torch.equal(g, start(8))


def test_refusals() -> None:
    for bad in (torch.zeros(3), torch.tensor([1.0, math.nan, 0.0])):
        with pytest.raises(ValueError, match="squared norm"):
            LanczosBasis(LocalSpace(), lambda v: v, bad)
    basis = LanczosBasis(LocalSpace(), lambda v: v, torch.ones(3))
    for coefficients in ([], [1.0, 2.0]):
        with pytest.raises(ValueError, match="coefficients"):
            basis.combine(coefficients)


def test_descent_follows_the_formula() -> None:
    h, g, eta, coefficient = symmetric(6), start(6), 0.05, 8.0
    products, space = 0, LocalSpace()

    def operator(v: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        return h @ v

    descent = InnerDescent(space, operator, g, 0.1, seed=3)
    zeta = LocalSpace().random_normal(g, 3)
    perturbed = g + 0.1 * g.norm() * zeta / zeta.norm()
    delta = torch.zeros_like(g)
    for _ in range(5):
        entry = descent.descend(coefficient, eta)
        norm = delta.norm()
        assert entry.update_norm == pytest.approx(float(norm))
        assert entry.gradient_dot == pytest.approx(float(g @ delta))
        assert entry.curvature == pytest.approx(float(delta @ h @ delta))
        assert entry.residual_norm == pytest.approx(float((g + h @ delta + coefficient / 2 * norm * delta).norm()))
        delta = delta - eta * (perturbed + h @ delta + coefficient / 2 * norm * delta)
        assert torch.allclose(descent.update, delta, rtol=1e-13)
    descent.descend(coefficient, 0.0)
    assert torch.allclose(descent.update, delta, rtol=1e-13)
    assert products == 5  # six calls, none at Delta = 0
    assert space.num_reductions == 2 + 2 * 6


def test_descent_converges_to_the_dual_solution() -> None:
    h, g = symmetric(5) - torch.eye(5, dtype=torch.float64), start(5)
    truth = solve_cubic_dense(h, g, 4.0)
    assert truth.eigenvalues[0] < -0.5  # indefinite
    descent = InnerDescent(LocalSpace(), lambda v: h @ v, g, 0.0, seed=0)
    for _ in range(3000):
        descent.descend(4.0, 0.02)
    entry = descent.descend(4.0, 0.0)
    assert torch.allclose(descent.update, torch.tensor(truth.coefficients, dtype=torch.float64), atol=1e-9)
    assert entry.residual_norm < 1e-9 and entry.update_norm == pytest.approx(truth.alpha, rel=1e-9)


def test_perturbation_leaves_the_saddle() -> None:
    """In the hard case the unperturbed iteration never finds the negative curvature; the perturbed one does."""
    h, g = torch.diag(torch.tensor([-1.0, 1.0], dtype=torch.float64)), torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = {}
    for perturbation in (0.0, 1e-3):
        descent = InnerDescent(LocalSpace(), lambda v: h @ v, g, perturbation, seed=0)
        for _ in range(400):
            descent.descend(2.0, 0.1)
        found[perturbation] = abs(float(descent.update[0]))
    assert found[0.0] == 0.0 and found[1e-3] == pytest.approx(math.sqrt(0.75), abs=0.02)
