"""Subspace steps and the metric against dense truths: restricted minimisers, transformed coordinates, memory."""

import dataclasses
import math

import pytest
import torch

from distributed_unlearn.solvers.cubic import solve_cubic_dense
from distributed_unlearn.solvers.inner.subspace import SubspaceShard
from distributed_unlearn.solvers.methods.scurenewton import SCureNewton, SCureNewtonSettings
from distributed_unlearn.solvers.metric import AdamMetric
from distributed_unlearn.solvers.problem import Memory
from tests.solvers.memory_oracle import LocalSpace, MemoryOracle
from tests.solvers.problems import SIZE, derivatives, noisy, problem, random_vector

START = 0.1 * random_vector(7)


def solver_on(oracle: MemoryOracle, **settings: object) -> SCureNewton:
    return SCureNewton(oracle, SCureNewtonSettings(**{"cubic_coefficient": 5.0, **settings}))  # type: ignore[arg-type]


def second_moment(gradients: list[torch.Tensor]) -> torch.Tensor:
    """`sqrt(v)` after these gradients, debiased, by the sum instead of the recursion."""
    weights = [0.99 ** (len(gradients) - 1 - i) for i in range(len(gradients))]
    total = sum(weight * g * g for weight, g in zip(weights, gradients, strict=True)) / sum(weights)
    return torch.as_tensor(total).sqrt()


def metric_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The diagonal of P."""
    spread = second_moment(gradients)
    mean = spread.square().mean().sqrt()
    return mean / (spread + 0.1 * mean)


@pytest.mark.parametrize("metric", ["identity", "adam"])
@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_the_step_is_the_exact_minimiser_on_its_subspace(metric: str, num_steps: int) -> None:
    """Step by step: the span of P g and the accepted steps, cubic term in the norm of P^-1, solved dense in float64."""
    oracle = MemoryOracle(noisy(), START)
    solver = solver_on(oracle, inner="subspace", metric=metric, subspace_steps=num_steps)
    gradients: list[torch.Tensor] = []
    taken: list[torch.Tensor] = []
    for step in range(4):
        before = oracle.weights.clone()
        gradient, hessian = derivatives(oracle.plain.objective, before, step)
        gradients.append(gradient)
        record = solver.step(step)
        diagonal = metric_of(gradients) if metric == "adam" else torch.ones_like(gradient)
        directions = torch.stack([diagonal * gradient, *taken[:num_steps]], dim=1)
        # orthonormal in P^-1: directions = basis R with basis' P^-1 basis = I
        basis = diagonal.sqrt()[:, None] * torch.linalg.qr(directions / diagonal.sqrt()[:, None])[0]
        coefficient = record.cubic_coefficient
        assert coefficient is not None and record.alpha is not None
        truth = solve_cubic_dense(basis.T @ hessian @ basis, basis.T @ gradient, coefficient)
        update = basis @ torch.tensor(truth.coefficients, dtype=torch.float64)
        assert torch.allclose(oracle.weights - before, update, rtol=1e-9, atol=1e-12)
        assert record.accepted and record.num_products == 1 + min(step, num_steps)
        assert record.alpha == pytest.approx(truth.alpha, rel=1e-9)
        assert record.gamma == pytest.approx(truth.gamma, rel=1e-9)
        assert record.alpha == pytest.approx(float((update**2 / diagonal).sum().sqrt()), rel=1e-9)
        assert record.smallest_ritz_value == pytest.approx(truth.eigenvalues[0], rel=1e-8, abs=1e-10)
        assert record.predicted_reduction == pytest.approx(truth.predicted_reduction, rel=1e-9)
        assert record.update_norm == pytest.approx(float(update.norm()), rel=1e-9)
        taken.insert(0, update)


@pytest.mark.parametrize("metric", ["identity", "adam"])
def test_the_two_parts_of_the_gradient_are_scaled_apart(metric: str) -> None:
    """Two directions instead of their sum: the minimiser on the larger span, dense in float64."""
    oracle = MemoryOracle(noisy(), START)
    oracle.plain.forget = lambda w, step: (w[:4] ** 2).sum() - w[2]
    record = solver_on(oracle, inner="subspace", metric=metric, subspace_gradient="by_role").step(0)
    gradient, hessian = derivatives(oracle.plain.objective, START, 0)
    forget, _ = derivatives(oracle.plain.forget, START, 0)
    diagonal = metric_of([gradient]) if metric == "adam" else torch.ones_like(gradient)
    directions = diagonal.sqrt()[:, None] * torch.stack([forget, gradient - forget], dim=1)
    basis = diagonal.sqrt()[:, None] * torch.linalg.qr(directions)[0]
    truth = solve_cubic_dense(basis.T @ hessian @ basis, basis.T @ gradient, 5.0)
    assert torch.allclose(oracle.weights - START, basis @ torch.tensor(truth.coefficients, dtype=torch.float64))
    assert record.num_products == 2 and record.predicted_reduction == pytest.approx(truth.predicted_reduction)


@pytest.mark.parametrize("inner", ["krylov", "subspace", "gradient_descent"])
def test_the_metric_step_is_the_plain_step_in_transformed_coordinates(inner: str) -> None:
    """With `w = S u` the objective `f(S u)` has gradient S g and Hessian S H S: the same step, identity metric."""
    objective = noisy()
    gradient, _ = derivatives(objective, START, 0)
    scale = metric_of([gradient]).sqrt()
    settings = {"inner": inner, "adaptive": False, "perturbation": 0.0, "inner_learning_rate": 0.02}
    in_metric = MemoryOracle(objective, START)
    found = solver_on(in_metric, metric="adam", **settings).step(0)
    transformed = MemoryOracle(lambda u, step: objective(scale * u, step), START / scale)
    expected = solver_on(transformed, **settings).step(0)
    assert torch.allclose(in_metric.weights, scale * transformed.weights, rtol=1e-10, atol=1e-12)
    for name in ("alpha", "gamma", "predicted_reduction", "actual_reduction", "residual", "smallest_ritz_value"):
        value = getattr(expected, name)
        assert getattr(found, name) == (None if value is None else pytest.approx(value, rel=1e-8)), name
    assert found.gradient_norm == pytest.approx(float(gradient.norm()))  # Euclidean, whatever the metric
    assert found.update_norm == pytest.approx(float((in_metric.weights - START).norm()))


def test_the_metric_has_no_unit_and_is_bounded() -> None:
    gradient = random_vector(3)
    gradient[0] = 0.0
    for factor in (1.0, 1e-6):
        scale = AdamMetric().scale(LocalSpace(SIZE), factor * gradient, Memory())
        assert torch.allclose(scale.square(), metric_of([gradient]), rtol=1e-10)
        assert float(scale[0] ** 2) == pytest.approx(10.0)  # 1 / floor
    assert bool((AdamMetric().scale(LocalSpace(SIZE), 1e-200 * gradient, Memory()) == 1.0).all())  # squares underflow
    with pytest.raises(ValueError, match="decay"):
        AdamMetric(decay=1.0)


def test_directions_that_the_others_contain_are_left_out() -> None:
    memory = Memory()
    gradient = random_vector(1)
    memory.vectors = {"accepted step 0": 3.0 * gradient, "accepted step 1": random_vector(2)}
    shard = SubspaceShard(problem(gradient, lambda v: v, memory=memory), num_steps=2)
    assert len(shard.advance()) == 3  # a slope, and one column entry for each of two directions
    shard.advance()
    assert shard.candidate(1.0, 0.0).norm().item() == pytest.approx(1.0)


def test_a_part_that_is_only_rounding_is_left_out() -> None:
    """At a round's start the retain term of token_matched is stationary: its gradient is float32's rounding."""
    gradient, noise = random_vector(1), 1e-7 * random_vector(2)
    parts = dataclasses.replace(problem(gradient + noise, lambda v: v), parts=(gradient, noise))
    assert len(SubspaceShard(parts, num_steps=0).advance()) == 2
    both = dataclasses.replace(parts, parts=(gradient, 1e4 * noise))
    assert len(SubspaceShard(both, num_steps=0).advance()) == 3


def test_rejected_steps_are_not_remembered() -> None:
    oracle = MemoryOracle(noisy(), START)
    solver = solver_on(oracle, inner="subspace", max_rejections=0)
    candidate = oracle.candidate
    oracle.candidate = lambda *v: type(t)(math.nan, *(t.update_norm, t.metric_norm)) if (t := candidate(*v)) else t  # type: ignore[method-assign]
    assert not solver.step(0).accepted and oracle.state_dict()["vectors"] == {}
    oracle.candidate = candidate  # type: ignore[method-assign]
    assert solver.step(1).num_products == 1 and solver.step(2).num_products == 2


@pytest.mark.parametrize("inner", ["krylov", "subspace", "gradient_descent"])
def test_a_restored_state_goes_on_bit_for_bit(inner: str) -> None:
    """Three steps, state and weights into new objects, three more: the same as six in one go."""
    settings = {"inner": inner, "metric": "adam", "subspace_steps": 2, "inner_learning_rate": 5.0}
    whole = MemoryOracle(noisy(), START)
    solver = solver_on(whole, **settings)
    records = [solver.step(step) for step in range(6)]
    first = MemoryOracle(noisy(), START)
    solver = solver_on(first, **settings)
    for step in range(3):
        solver.step(step)
    second = MemoryOracle(noisy(), first.weights)
    second.load_state_dict(first.state_dict())
    later = solver_on(second, **settings)
    later.load_state_dict(solver.state_dict())
    resumed = [later.step(step) for step in range(3, 6)]
    assert torch.equal(second.weights, whole.weights)
    assert [r.alpha for r in resumed] == [r.alpha for r in records[3:]]
    assert later.state_dict() != {}
