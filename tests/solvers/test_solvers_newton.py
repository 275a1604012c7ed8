"""CureNewton, damped and pseudo-inverse Newton against dense float64 linear algebra, and what they say on failure."""

import dataclasses
import math

import pytest
import torch

from distributed_unlearn.errors import ConfigError
from distributed_unlearn.solvers.cubic import solve_cubic_dense
from distributed_unlearn.solvers.methods.curenewton import CureNewton, CureNewtonSettings
from distributed_unlearn.solvers.methods.damped_newton import DampedNewton, DampedNewtonSettings
from distributed_unlearn.solvers.methods.pinv_newton import PinvNewton, PinvNewtonSettings
from tests.solvers.memory_oracle import MemoryOracle
from tests.solvers.problems import SIZE, derivatives, noisy, random_vector

START = 0.1 * random_vector(7)
EIGENVALUES = torch.linspace(0.5, 4.0, SIZE, dtype=torch.float64)


def convex(w: torch.Tensor, step: int) -> torch.Tensor:
    return 0.5 * (EIGENVALUES * w * w).sum() + w @ random_vector(5)


def degenerate(w: torch.Tensor, step: int) -> torch.Tensor:
    """Curvature 1e-4 in half of the space and a slope there: what a trained network looks like."""
    curvature = torch.where(torch.arange(SIZE) < SIZE // 2, 1e-4, 1.0).double()
    return 0.5 * (curvature * w * w).sum() + w @ random_vector(5) + 1e-3 * (w**4).sum()


@pytest.mark.parametrize("coefficient", [0.1, 10.0])
def test_curenewton_is_the_exact_cubic_minimiser(coefficient: float) -> None:
    oracle = MemoryOracle(noisy(), START)
    record = CureNewton(oracle, CureNewtonSettings(cubic_coefficient=coefficient)).step(0)
    gradient, hessian = derivatives(oracle.plain.objective, START, 0)
    truth = solve_cubic_dense(hessian, gradient, coefficient)
    assert torch.allclose(oracle.weights - START, torch.tensor(truth.coefficients, dtype=torch.float64), atol=1e-12)
    assert record.num_products == oracle.num_products == SIZE and record.num_krylov_steps == 0
    assert (record.alpha, record.gamma) == pytest.approx((truth.alpha, truth.gamma), rel=1e-10)
    assert record.smallest_ritz_value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[0]), rel=1e-10)
    assert record.residual < 1e-12 and record.accepted and record.result == "successful"


def test_curenewton_is_adaptive_on_request() -> None:
    """Rejections search on the same spectrum: a trial each, and no product."""
    settings = CureNewtonSettings(cubic_coefficient=1e-6, adaptive=True, max_rejections=60)
    oracle = MemoryOracle(noisy(quartic=50.0), START)
    record = CureNewton(oracle, settings).step(0)
    assert record.accepted and record.num_rejections > 0 and record.num_products == SIZE
    fixed = CureNewton(MemoryOracle(noisy(quartic=50.0), START), dataclasses.replace(settings, adaptive=False)).step(0)
    assert fixed.accepted and fixed.actual_reduction < 0.0  # the paper's: kept, whatever it does


@pytest.mark.parametrize("kind", ["curenewton", "pinv_newton"])
def test_a_model_too_large_for_a_matrix_is_refused(kind: str) -> None:
    oracle = MemoryOracle(noisy(), START)
    methods = {
        "curenewton": CureNewton(oracle, CureNewtonSettings(max_parameters=SIZE - 1)),
        "pinv_newton": PinvNewton(oracle, PinvNewtonSettings(max_parameters=SIZE - 1)),
    }
    with pytest.raises(ConfigError, match=r"got 12 trainable parameters .* at most solver.max_parameters = 11"):
        methods[kind].step(0)
    assert oracle.num_products == 0 and torch.equal(oracle.weights, START)


def test_damped_newton_solves_the_damped_system() -> None:
    oracle = MemoryOracle(convex, START)
    record = DampedNewton(oracle, DampedNewtonSettings(damping=0.3, cg_tolerance=1e-12)).step(0)
    gradient, hessian = derivatives(convex, START, 0)
    truth = -torch.linalg.solve(hessian + 0.3 * torch.eye(SIZE, dtype=torch.float64), gradient)
    assert torch.allclose(oracle.weights - START, truth, atol=1e-10)
    assert record.result == "successful" and record.gamma == 0.3 and record.num_products == oracle.num_products <= SIZE
    assert record.alpha is record.cubic_coefficient is record.acceptance_ratio is record.smallest_ritz_value is None
    model = float(gradient @ truth + 0.5 * truth @ hessian @ truth)
    assert record.predicted_reduction == pytest.approx(-model, rel=1e-9)
    assert record.actual_reduction == pytest.approx(-model, rel=1e-9)  # the objective is quadratic
    residual = float((gradient + hessian @ truth + 0.3 * truth).norm() / gradient.norm())
    assert record.residual == pytest.approx(residual, abs=1e-11)


def test_damped_newton_says_when_it_did_not_converge_or_the_system_is_indefinite() -> None:
    short = DampedNewton(MemoryOracle(convex, START), DampedNewtonSettings(max_cg_steps=2, cg_tolerance=1e-9)).step(0)
    assert short.result == "max_cg_steps" and short.num_products == 2 and short.residual > 1e-9
    oracle = MemoryOracle(noisy(quartic=0.0), START)
    settings = DampedNewtonSettings(damping=1e-3, cg_tolerance=1e-9, max_cg_steps=200)
    indefinite = DampedNewton(oracle, settings).step(0)
    gradient, hessian = derivatives(oracle.plain.objective, START, 0)
    assert float(torch.linalg.eigvalsh(hessian)[0]) < -1.0
    assert indefinite.result == "negative_curvature" and indefinite.accepted
    # it still solves the linear system, as the Newton step does: no minimiser
    truth = -torch.linalg.solve(hessian + 1e-3 * torch.eye(SIZE, dtype=torch.float64), gradient)
    assert torch.allclose(oracle.weights - START, truth, rtol=1e-5, atol=1e-7)


def test_pinv_newton_leaves_out_what_is_below_the_cutoff() -> None:
    oracle = MemoryOracle(degenerate, torch.zeros(SIZE, dtype=torch.float64))
    gradient, hessian = derivatives(degenerate, oracle.weights, 0)
    record = PinvNewton(oracle, PinvNewtonSettings(cutoff=1e-3)).step(0)
    truth = -torch.linalg.pinv(hessian, rtol=1e-3) @ gradient
    assert torch.allclose(oracle.weights, truth, atol=1e-12)
    assert record.residual == pytest.approx(float(gradient[: SIZE // 2].norm() / gradient.norm()))
    assert record.gamma is record.alpha is None and record.num_products == SIZE and record.result == "successful"
    assert PinvNewton(MemoryOracle(noisy(), START), PinvNewtonSettings()).step(0).result == "negative_curvature"


def test_baselines_explode_where_the_cubic_step_does_not() -> None:
    """The record shows it: the update norm, and a loss that rose; nothing tests the step."""
    zero = torch.zeros(SIZE, dtype=torch.float64)
    cubic = CureNewton(MemoryOracle(degenerate, zero), CureNewtonSettings(cubic_coefficient=1.0)).step(0)
    pinv = PinvNewton(MemoryOracle(degenerate, zero), PinvNewtonSettings()).step(0)
    damped = DampedNewton(MemoryOracle(degenerate, zero), DampedNewtonSettings(damping=1e-4)).step(0)
    assert cubic.actual_reduction > 0.0 and cubic.update_norm < 5.0
    for exploded in (pinv, damped):
        assert exploded.accepted and exploded.update_norm > 1e3 and exploded.actual_reduction < -1e6


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_trial_that_is_not_finite_is_undone(loss: float) -> None:
    oracle = MemoryOracle(convex, START)
    candidate = oracle.candidate
    oracle.candidate = lambda *v: dataclasses.replace(candidate(*v), loss=loss)  # type: ignore[method-assign]
    record = DampedNewton(oracle, DampedNewtonSettings()).step(0)
    assert record.result == "nonfinite" and not record.accepted and record.update_norm is None
    assert torch.equal(oracle.weights, START) and oracle.num_undone == 1


@pytest.mark.parametrize("method", [CureNewton, PinvNewton, DampedNewton])
def test_a_product_that_is_not_finite_takes_no_step(method) -> None:  # noqa: ANN001
    settings = {
        CureNewton: CureNewtonSettings(),
        PinvNewton: PinvNewtonSettings(),
        DampedNewton: DampedNewtonSettings(),
    }
    oracle = MemoryOracle(convex, START)
    oracle.plain.product = lambda v: v * math.nan  # type: ignore[method-assign]
    record = method(oracle, settings[method]).step(0)
    assert record.result == "nonfinite" and oracle.num_trials == 0 and torch.equal(oracle.weights, START)
