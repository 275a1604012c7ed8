"""Whole steps over an in-memory oracle: accept, reject, undo, products counted, M adapted."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from memory_oracle import MemoryOracle

from distributed_unlearn.records import StepRecord
from distributed_unlearn.solvers.adaptation import Adaptation, estimate_coefficient
from distributed_unlearn.solvers.cubic import solve_cubic_dense
from distributed_unlearn.solvers.inner.first_order import AdamWSpec, SgdSpec
from distributed_unlearn.solvers.methods.first_order import FirstOrder
from distributed_unlearn.solvers.methods.scurenewton import SCureNewton, SCureNewtonSettings
from distributed_unlearn.solvers.protocols import Trial
from distributed_unlearn.solvers.solution import Result

CURVATURES = torch.tensor([-1.0, 0.5, 2.0, 3.0], dtype=torch.float64)
NEAR_INFLECTION = torch.tensor([0.6, 0.62, -0.6], dtype=torch.float64)
"""Of double_well: almost no curvature, so that a Newton step goes far past the minimum."""
ORIGIN = torch.tensor([0.3, -0.2, 0.4, 1.0], dtype=torch.float64)


def quadratic(w: torch.Tensor, step: int) -> torch.Tensor:
    return 0.5 * (CURVATURES * w * w).sum() + (w * torch.tensor([1.0, 2.0, -1.0, 0.5])).sum() + 7.0


def rosenbrock(w: torch.Tensor, step: int) -> torch.Tensor:
    return (100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2).sum()


def double_well(w: torch.Tensor, step: int) -> torch.Tensor:
    return 0.25 * ((w * w - 1) ** 2).sum() + 0.05 * w.sum()


def newton(oracle: MemoryOracle, **settings: Any) -> SCureNewton:
    return SCureNewton(oracle, SCureNewtonSettings(**settings))


def test_full_space_step_is_the_exact_cubic_step() -> None:
    oracle = MemoryOracle(quadratic, ORIGIN)
    record = newton(oracle, max_krylov_steps=4, krylov_tolerance=0.0, cubic_coefficient=10.0).step(0)
    gradient = CURVATURES * ORIGIN + torch.tensor([1.0, 2.0, -1.0, 0.5])
    truth = solve_cubic_dense(torch.diag(CURVATURES), gradient, 10.0)
    assert torch.allclose(oracle.weights - ORIGIN, torch.tensor(truth.coefficients, dtype=torch.float64), atol=1e-12)
    assert record.accepted and record.result == "krylov_exhausted" and record.num_rejections == 0
    assert record.num_products == record.num_krylov_steps == oracle.num_products == 4
    assert record.alpha == pytest.approx(truth.alpha) and record.gamma == pytest.approx(truth.gamma)
    assert record.update_norm == pytest.approx(truth.alpha)
    assert record.smallest_ritz_value == pytest.approx(-1.0) and record.largest_ritz_value == pytest.approx(3.0)
    assert record.predicted_reduction == pytest.approx(truth.predicted_reduction)
    # the objective is quadratic: it falls by the model's cubic term more than predicted
    assert record.actual_reduction == pytest.approx(truth.predicted_reduction + 10 / 6 * truth.alpha**3)
    assert record.acceptance_ratio == pytest.approx(record.actual_reduction / record.predicted_reduction, rel=1e-4)
    assert record.terms == {"loss": record.loss} and record.wall_seconds > 0
    assert record.cubic_coefficient == 10.0


def test_growth_stops_at_the_tolerance() -> None:
    def two_valued(w: torch.Tensor, step: int) -> torch.Tensor:
        return 0.5 * (torch.tensor([1.0, 1.0, 1.0, 4.0], dtype=torch.float64) * w * w).sum() + w.sum()

    oracle = MemoryOracle(two_valued, ORIGIN)
    assert newton(oracle, max_krylov_steps=4).step(0).num_products == 2  # two distinct eigenvalues
    loose = newton(MemoryOracle(quadratic, ORIGIN), max_krylov_steps=4, krylov_tolerance=0.9).step(0)
    assert loose.num_products == 1 and loose.result == "successful" and 0.0 < loose.residual <= 0.9
    short = newton(MemoryOracle(quadratic, ORIGIN), max_krylov_steps=2, krylov_tolerance=1e-9).step(0)
    assert short.num_products == 2 and short.result == "max_krylov_steps" and short.residual > 1e-9


@pytest.mark.parametrize("adaptation", ["factor", "interpolated"])
def test_rejection_costs_no_product_and_undoes_exactly(adaptation: str) -> None:
    oracle = MemoryOracle(double_well, NEAR_INFLECTION)
    seen: list[torch.Tensor] = []
    undo = oracle.undo

    def watched_undo() -> None:
        undo()
        seen.append(oracle.weights.clone())

    oracle.undo = watched_undo  # type: ignore[method-assign]
    before = oracle.weights.clone()
    solver = newton(oracle, max_krylov_steps=3, cubic_coefficient=1e-6, adaptation=adaptation, max_rejections=60)
    record = solver.step(0)
    assert record.accepted and record.num_rejections == len(seen) > 0
    assert all(torch.equal(weights, before) for weights in seen)
    assert record.num_products == oracle.num_products <= 3
    assert oracle.num_trials == record.num_rejections + 1 == oracle.num_undone + oracle.num_accepted
    assert record.acceptance_ratio >= 0.1 and record.cubic_coefficient > 1e-6
    assert float(double_well(oracle.weights, 0)) == pytest.approx(record.loss - record.actual_reduction)


def test_factor_rule_sequence() -> None:
    """M is multiplied by 4 per rejection, kept on a fair step, divided by 3 after a very good one."""
    oracle = MemoryOracle(quadratic, ORIGIN)
    losses = iter([math.nan, 100.0, None, None])  # two bad trials, then true ones

    original = oracle.candidate

    def scripted(*coefficients: float) -> Trial:
        trial, loss = original(*coefficients), next(losses)
        return trial if loss is None else dataclasses.replace(trial, loss=loss)

    oracle.candidate = scripted  # type: ignore[method-assign]
    solver = newton(oracle, adaptation="factor", cubic_coefficient=3.0, max_krylov_steps=2)
    record = solver.step(0)
    assert record.num_rejections == 2 and record.cubic_coefficient == 3.0 * 16
    assert record.acceptance_ratio > 0.7 and solver.cubic_coefficient == 16.0
    assert solver.step(1).cubic_coefficient == 16.0


def test_interpolated_rule_and_its_bounds() -> None:
    rule = Adaptation("interpolated", increase_factor=4.0, decrease_factor=3.0, very_good_threshold=0.7)
    # accepted: sqrt(M * 2 M_est) within [M / 3, 4 M]; below the loss's rounding by the ratio
    assert rule.after_acceptance(10.0, 20.0, 0.5) == pytest.approx(20.0)
    assert rule.after_acceptance(10.0, 5.0, 0.9) == pytest.approx(10.0)
    assert rule.after_acceptance(10.0, -5.0, 2.0) == pytest.approx(10 / 3)
    assert rule.after_acceptance(10.0, 1e9, 0.2) == pytest.approx(40.0)
    assert rule.after_acceptance(10.0, None, 0.9) == pytest.approx(10 / 3)
    assert rule.after_acceptance(10.0, None, 0.5) == 10.0
    # rejected: 2 M_est within [2 M, 64 M]; 4 M without an estimate
    assert rule.after_rejection(10.0, 35.0) == pytest.approx(70.0)
    assert rule.after_rejection(10.0, 1.0) == 20.0 and rule.after_rejection(10.0, 1e9) == 640.0
    assert rule.after_rejection(10.0, None) == 40.0
    assert rule.after_rejection(1e12, 1e13) == 1e12 and rule.after_acceptance(1e-8, -1.0, 2.0) == 1e-8
    # predicted 0.5, actual 0.1, ||y|| = 2: M + 6 * 0.4 / 8
    assert estimate_coefficient(10.0, 0.5, 0.1, 2.0, 1e-6) == pytest.approx(10.3)
    assert estimate_coefficient(10.0, 0.5, 0.1, 2.0, 0.4) is None  # the rounding of the loss
    assert estimate_coefficient(10.0, 0.5, math.nan, 2.0, 1e-6) is None
    assert estimate_coefficient(10.0, 0.5, -math.inf, 2.0, 1e-6) is None


def test_interpolated_rule_meets_a_cubic_objective() -> None:
    """On f = g'w + (c/6)|w|^3 the estimate after any trial is c itself, so the next trial's ratio is 1."""

    def cubic(w: torch.Tensor, step: int) -> torch.Tensor:
        return w @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 50 / 6 * (w @ w + 1e-300) ** 1.5

    oracle = MemoryOracle(cubic, torch.zeros(2, dtype=torch.float64))
    solver = newton(oracle, cubic_coefficient=10.0, max_krylov_steps=2)
    record = solver.step(0)
    # after a rejection the coefficient is twice the estimate, see `Adaptation`
    assert record.num_rejections == 1 and record.cubic_coefficient == pytest.approx(100.0, rel=1e-6)
    assert record.acceptance_ratio > 1.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 8.0])
def test_the_difference_of_the_minibatches_stays_out_of_m(shift: float, sign: float) -> None:
    """Both minibatches have third derivative c; the curvature minibatch's Hessian is another by `shift`.

    The trial's own error would add `-3 shift / ||y||` to c; the curvature minibatch's is c, and its size counts. The
    first estimate is taken as it is (twice), the second by the geometric mean.
    """
    cubic, size = 5.0 * sign, 5.0

    def objective(curvature: float):  # noqa: ANN202
        def loss(w: torch.Tensor, step: int) -> torch.Tensor:
            return 10.0 - w.sum() + 0.5 * curvature * w @ w + cubic / 6 * (w @ w + 1e-300) ** 1.5

        return loss

    for first, expected in ((8.0, 2 * size), (500.0, 2 * size), (1e-2, 64e-2)):
        oracle = MemoryOracle(objective(10.0), torch.zeros(3, dtype=torch.float64), objective(10.0 + shift))
        solver = newton(oracle, cubic_coefficient=first, krylov_tolerance=0.0)
        record = solver.step(0)
        assert record.accepted and record.num_rejections == 0
        assert solver.cubic_coefficient == pytest.approx(expected, rel=1e-6)
    second = SCureNewton(oracle, SCureNewtonSettings(cubic_coefficient=8.0))
    second.load_state_dict({"cubic_coefficient": 8.0, "has_measured": 1.0})
    oracle.weights.zero_()
    second.step(1)
    assert second.cubic_coefficient == pytest.approx(math.sqrt(8.0 * 2 * size), rel=1e-6)


def test_a_trial_on_one_minibatch_is_its_own_measure() -> None:
    """Where both minibatches are one, nothing more is measured; the fixed and the factor rule never measure it."""
    for curvature, settings in ((None, {}), (quadratic, {"adaptive": False}), (quadratic, {"adaptation": "factor"})):
        oracle = MemoryOracle(quadratic, ORIGIN, curvature)
        forbidden = "whole_change" if curvature is None else "sampled_change"
        setattr(oracle.plain, forbidden, lambda *_: 1 / 0)
        assert newton(oracle, **settings).step(0).accepted


@pytest.mark.parametrize("inner", ["krylov", "gradient_descent"])
def test_rejections_run_out(inner: str) -> None:
    oracle = MemoryOracle(quadratic, ORIGIN)
    original = oracle.candidate
    oracle.candidate = lambda *args: dataclasses.replace(original(*args), loss=1e9)  # type: ignore[method-assign]
    solver = newton(oracle, inner=inner, max_rejections=3, inner_steps=2, inner_learning_rate=1e-3)
    record = solver.step(0)
    assert not record.accepted and record.result == "rejected" and record.num_rejections == 4
    assert record.update_norm is None and torch.equal(oracle.weights, ORIGIN)
    assert solver.cubic_coefficient == 1600.0  # increase_factor^2, however large M became within the step
    assert record.num_products == oracle.num_products
    assert oracle.num_products == (8 if inner == "gradient_descent" else 2) and oracle.num_trials == 4


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_nonfinite_trial_is_undone(adaptive: bool, loss: float) -> None:
    oracle = MemoryOracle(quadratic, ORIGIN)
    original = oracle.candidate
    oracle.candidate = lambda *c: dataclasses.replace(original(*c), loss=loss)  # type: ignore[method-assign]
    record = newton(oracle, adaptive=adaptive, max_rejections=2).step(0)
    assert record.result == "nonfinite" and not record.accepted and torch.equal(oracle.weights, ORIGIN)
    assert record.num_rejections == (3 if adaptive else 1)
    assert record.actual_reduction is None and record.acceptance_ratio is None


def test_fixed_coefficient_always_accepts() -> None:
    oracle = MemoryOracle(double_well, NEAR_INFLECTION)
    solver = newton(oracle, adaptive=False, cubic_coefficient=1e-6)
    record = solver.step(0)
    assert record.accepted and record.acceptance_ratio < 0.1 and solver.cubic_coefficient == 1e-6


def test_zero_and_nonfinite_gradient_take_no_step() -> None:
    flat = MemoryOracle(lambda w, step: (w * 0.0).sum() + 2.0, ORIGIN)
    record = newton(flat).step(0)
    assert record.result == "zero_gradient" and not record.accepted and record.num_products == 0
    broken = MemoryOracle(lambda w, step: (w * math.nan).sum(), ORIGIN)
    record = newton(broken).step(0)
    assert record.result == "nonfinite" and not record.accepted and broken.num_trials == 0


def test_nonfinite_product_takes_no_step() -> None:
    oracle = MemoryOracle(quadratic, ORIGIN)
    oracle.advance = lambda: (math.nan, math.nan)  # type: ignore[method-assign]
    record = newton(oracle).step(0)
    assert record.result == "nonfinite" and oracle.num_trials == 0 and record.predicted_reduction is None


def run(oracle: MemoryOracle, solver: SCureNewton, num_steps: int) -> list[StepRecord]:
    return [solver.step(index) for index in range(num_steps)]


@pytest.mark.parametrize("adaptation", ["factor", "interpolated"])
def test_converges_on_nonconvex_functions(adaptation: str) -> None:
    valley = MemoryOracle(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
    run(valley, newton(valley, max_krylov_steps=2, adaptation=adaptation, cubic_coefficient=1.0), 80)
    assert torch.allclose(valley.weights, torch.ones(2, dtype=torch.float64), atol=1e-4)
    # starts at the maximum between the wells, gradient tiny and curvature negative
    wells = MemoryOracle(double_well, torch.zeros(5, dtype=torch.float64))
    records = run(wells, newton(wells, adaptation=adaptation, cubic_coefficient=1.0), 15)
    assert records[0].smallest_ritz_value < 0 and float(double_well(wells.weights, 0)) < -0.2


def test_interpolated_rule_wastes_fewer_trials() -> None:
    """Noisy logistic-like problem with a curvature minibatch a third of the gradient's: fewer rejections, same end."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(240, 12, generator=generator, dtype=torch.float64)
    labels = torch.sign(torch.randn(240, generator=generator, dtype=torch.float64))

    def loss_on(size: int):  # noqa: ANN202
        def loss(w: torch.Tensor, step: int) -> torch.Tensor:
            rows = torch.randperm(240, generator=torch.Generator().manual_seed(step))[:24][:size]
            hidden = torch.tanh(data[rows] @ w[:96].view(12, 8))
            return torch.nn.functional.softplus(-labels[rows] * (hidden @ w[96:])).mean()

        return loss

    start = 0.5 * torch.randn(104, generator=generator, dtype=torch.float64)
    rejections, final = {}, {}
    for adaptation in ("factor", "interpolated"):
        oracle = MemoryOracle(loss_on(24), start, loss_on(8))
        records = run(oracle, newton(oracle, adaptation=adaptation, cubic_coefficient=1.0), 60)
        rejections[adaptation] = sum(record.num_rejections for record in records)
        final[adaptation] = sum(record.loss for record in records[-20:]) / 20
    assert rejections["interpolated"] <= 0.5 * rejections["factor"], rejections
    assert final["interpolated"] <= final["factor"] + 0.02, final


def test_gradient_descent_reaches_the_krylov_step() -> None:
    steps = {}
    for inner in ("krylov", "gradient_descent"):
        oracle = MemoryOracle(quadratic, ORIGIN)
        settings = {"inner_steps": 2000, "inner_learning_rate": 0.05, "perturbation": 0.0}
        record = newton(oracle, inner=inner, max_krylov_steps=4, krylov_tolerance=1e-6, **settings).step(0)
        steps[inner] = (oracle.weights, record.predicted_reduction, record.gamma)
        assert record.num_products == oracle.num_products == (2000 if inner == "gradient_descent" else 4)
    assert torch.allclose(steps["krylov"][0], steps["gradient_descent"][0], atol=1e-8)
    assert steps["krylov"][1:] == pytest.approx(steps["gradient_descent"][1:], rel=1e-8)


def test_gradient_descent_predicts_the_update_it_tries() -> None:
    oracle = MemoryOracle(quadratic, ORIGIN)
    record = newton(oracle, inner="gradient_descent", inner_steps=3, inner_learning_rate=0.02).step(0)
    update = oracle.weights - ORIGIN
    gradient = CURVATURES * ORIGIN + torch.tensor([1.0, 2.0, -1.0, 0.5])
    model = gradient @ update + 0.5 * (CURVATURES * update) @ update + 100 / 6 * update.norm() ** 3
    assert record.predicted_reduction == pytest.approx(-float(model), rel=1e-12)
    assert record.result == "max_inner_steps" and record.update_norm == pytest.approx(float(update.norm()))
    assert record.num_products == 3 and record.num_krylov_steps == 0 and record.smallest_ritz_value is None


def test_diverging_inner_descent_shrinks_its_rate_and_goes_on() -> None:
    """eta = 0.05 is 250 times what curvature 1e4 allows: four divisions by 4 are enough, and later steps keep them."""
    settings = {"inner": "gradient_descent", "inner_steps": 4, "inner_learning_rate": 0.05, "cubic_coefficient": 1e-4}
    oracle = MemoryOracle(lambda w, step: 5e3 * (w * w).sum(), ORIGIN)
    solver = newton(oracle, **settings)
    first, second = solver.step(0), solver.step(1)
    assert first.accepted and first.predicted_reduction > 0.0 and first.num_products == oracle.num_products - 4
    assert solver.state_dict()["inner_learning_rate"] == pytest.approx(0.05 / 4**4)
    assert second.accepted and second.num_products == 4
    paper = newton(MemoryOracle(lambda w, step: 5e3 * (w * w).sum(), ORIGIN), adaptive=False, **settings).step(0)
    assert paper.accepted and paper.actual_reduction < 0.0  # the fixed rule measures and keeps everything


def test_an_inner_descent_that_nothing_helps_is_not_tried() -> None:
    oracle = MemoryOracle(quadratic, ORIGIN)
    advance = oracle.advance
    oracle.advance = lambda *v: (1.0, 1.0, 1.0, 1.0) if advance(*v) else ()  # type: ignore[method-assign]
    record = newton(oracle, inner="gradient_descent", inner_steps=1).step(0)
    assert record.result == "inner_not_descending" and not record.accepted and oracle.num_trials == 0
    assert record.num_products == oracle.num_products == 9  # once, and once for each of 8 smaller rates
    assert record.update_norm is None and torch.equal(oracle.weights, ORIGIN)


def test_inner_rate_is_limited_when_m_grows() -> None:
    """Without the limit a large M makes the inner loop overshoot; the paper's fixed rule leaves the rate alone."""
    settings = {"inner": "gradient_descent", "inner_learning_rate": 0.1, "cubic_coefficient": 1e6, "inner_steps": 20}
    record = newton(MemoryOracle(quadratic, ORIGIN), **settings).step(0)
    assert record.accepted and record.acceptance_ratio > 0.9
    fixed = newton(MemoryOracle(quadratic, ORIGIN), adaptive=False, **settings).step(0)
    assert fixed.predicted_reduction is None or fixed.predicted_reduction < 0.0


def test_no_estimate_below_the_rounding_of_the_loss() -> None:
    """A far too large M makes steps too small to measure; M must come down all the same, and the step count as good."""
    solver = newton(MemoryOracle(quadratic, ORIGIN), cubic_coefficient=1e12)
    record = solver.step(0)
    assert record.accepted and record.acceptance_ratio == pytest.approx(1.0, abs=0.4)
    assert solver.cubic_coefficient == pytest.approx(1e12 / 3)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"max_krylov_steps=0, subspace_steps=-1"):
        SCureNewtonSettings(max_krylov_steps=0, subspace_steps=-1)
    with pytest.raises(ValueError, match=r"cubic_coefficient=-1.0, decrease_factor=0.5"):
        SCureNewtonSettings(cubic_coefficient=-1.0, decrease_factor=0.5)
    with pytest.raises(ValueError, match="very_good_threshold"):
        SCureNewtonSettings(acceptance_threshold=0.5, very_good_threshold=0.4)


def test_results_of_records_are_members() -> None:
    oracle = MemoryOracle(quadratic, ORIGIN)
    assert Result[newton(oracle).step(0).result] in Result


@pytest.mark.parametrize("method", ["adamw", "sgd"])
def test_first_order_steps_are_torchs(method: str) -> None:
    """Three steps with weight decay, against torch's optimiser on one parameter."""
    spec = AdamWSpec(0.1) if method == "adamw" else SgdSpec(0.1, momentum=0.9)
    oracle, parameter = MemoryOracle(double_well, ORIGIN), torch.nn.Parameter(ORIGIN.clone())
    solver = FirstOrder(oracle, spec, 0.05)
    if method == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([parameter], lr=0.05, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD([parameter], lr=0.05, weight_decay=0.1, momentum=0.9)
    for step in range(3):
        before = oracle.weights.clone()
        record = solver.step(step)
        optimizer.zero_grad()
        double_well(parameter, step).backward()
        optimizer.step()
        assert torch.allclose(oracle.weights, parameter.detach(), rtol=1e-12)
        assert record.update_norm == pytest.approx(float((oracle.weights - before).norm()), rel=1e-12)
        assert record.actual_reduction is None and oracle.num_undone == 0


def test_first_order_step() -> None:
    oracle = MemoryOracle(quadratic, ORIGIN)
    record = FirstOrder(oracle, SgdSpec(0.0), 0.1).step(4)
    gradient = CURVATURES * ORIGIN + torch.tensor([1.0, 2.0, -1.0, 0.5])
    assert torch.allclose(oracle.weights, ORIGIN - 0.1 * gradient)
    assert record.step == 4 and record.result == "successful" and record.accepted
    assert record.alpha is record.gamma is record.cubic_coefficient is record.residual is None
    assert record.gradient_norm == pytest.approx(float(gradient.norm())) and record.num_products == 0
    assert record.update_norm == pytest.approx(0.1 * record.gradient_norm)
    with pytest.raises(ValueError, match="learning_rate"):
        FirstOrder(oracle, SgdSpec(0.0), 0.0)
    broken = FirstOrder(MemoryOracle(lambda w, step: (w * math.nan).sum(), ORIGIN), SgdSpec(0.0), 0.1).step(0)
    assert broken.result == "nonfinite" and not broken.accepted
