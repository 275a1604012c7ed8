"""Slow truths on one unsharded module: what every fast product is compared with.

Parameter vectors are dictionaries from qualified parameter name to a tensor of the parameter's shape. The
rows that `frozen_rows` names (embedding rows at `padding_idx`) are held fixed: the operator is the Hessian
(or Gauss-Newton matrix) over the remaining entries, and the row's entries of `v`, of the gradient and of the
product are zero. With tied embeddings that includes the row's role as output weight: one tensor, one rule,
and the only one under which the product is symmetric, as reverse mode drops half of the row's gradient.

For float64 truth call these with a float64 model inside `LiftFloat32Casts`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distributed_unlearn.curvature.precision import exact_attention
from distributed_unlearn.curvature.segments import frozen_rows as frozen_rows

NamedTensors = dict[str, Tensor]
LossFunction = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Reference:
    """Loss, gradient and product at the current weights; the tensors are detached."""

    loss: Tensor
    """Scalar."""
    gradient: NamedTensors
    hvp: NamedTensors
    """`H v`, or `G v` from `gauss_newton_product`."""
    relative_error_estimate: float | None = None
    """`central_difference` only: `||last - previous extrapolation|| / ||last||` of the product."""


def zero_frozen_rows_(vector: NamedTensors, rows: dict[str, int]) -> NamedTensors:
    """Zero in place the row `rows[name]` of each tensor that has one; returns `vector`."""
    for name, row in rows.items():
        if name in vector:
            vector[name][row] = 0
    return vector


def _parameters(model: nn.Module, tangent: NamedTensors) -> NamedTensors:
    parameters = dict(model.named_parameters())
    unknown = sorted(set(tangent) - set(parameters))
    assert not unknown, f"no parameters of the model: {unknown[:3]}"
    for name, direction in tangent.items():
        parameter = parameters[name]
        assert parameter.shape == direction.shape, f"{name}: {tuple(direction.shape)} for {tuple(parameter.shape)}"
        assert parameter.requires_grad, f"{name} does not require a gradient"
    return {name: parameters[name] for name in tangent}


def _free_tangent(model: nn.Module, tangent: NamedTensors) -> tuple[NamedTensors, dict[str, int]]:
    rows = frozen_rows(model)
    return zero_frozen_rows_({name: direction.detach().clone() for name, direction in tangent.items()}, rows), rows


def _named(names: NamedTensors, values: tuple[Tensor, ...], rows: dict[str, int]) -> NamedTensors:
    return zero_frozen_rows_(dict(zip(names, (value.detach().clone() for value in values), strict=True)), rows)


def _dot(left: tuple[Tensor, ...], right: NamedTensors) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right.values(), strict=True)]).sum()


def _norm(vector: NamedTensors) -> float:
    return float(torch.stack([value.detach().double().square().sum() for value in vector.values()]).sum().sqrt())


def double_backward(model: nn.Module, loss_fn: LossFunction, tangent: NamedTensors) -> Reference:
    """`H v = grad of (grad L . v)` by reverse over reverse (Pearlmutter 1994), all at once, nothing sharded.

    Args:
        model: any module; its parameters are not changed.
        loss_fn: the scalar loss `L` of the model, with a graph; attention runs on the math kernel.
        tangent: `v`, for the parameters that count as variables; all others are constants.
    """
    parameters = _parameters(model, tangent)
    direction, rows = _free_tangent(model, tangent)
    variables = tuple(parameters.values())
    with exact_attention(), torch.enable_grad():
        loss = loss_fn(model)
        gradient = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
        slope = _dot(gradient, direction)
        # A loss that is linear in the variables has a gradient without a graph, and H v = 0.
        if slope.requires_grad:
            product = torch.autograd.grad(slope, variables, materialize_grads=True)
        else:
            product = tuple(torch.zeros_like(variable) for variable in variables)
    return Reference(loss.detach(), _named(parameters, gradient, rows), _named(parameters, product, rows))


def _gradient(model: nn.Module, loss_fn: LossFunction, parameters: NamedTensors) -> tuple[Tensor, NamedTensors]:
    with exact_attention(), torch.enable_grad():
        loss = loss_fn(model)
        values = torch.autograd.grad(loss, tuple(parameters.values()), materialize_grads=True)
    return loss.detach(), dict(zip(parameters, values, strict=True))


def _difference(
    model: nn.Module, loss_fn: LossFunction, parameters: NamedTensors, direction: NamedTensors, step: float
) -> NamedTensors:
    """`(g(w + step v) - g(w - step v)) / (2 step)` in float64; the weights are restored bit for bit."""
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    gradients = []
    try:
        for offset in (step, -step):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(saved[name].double() + offset * direction[name].double())
            gradients.append(_gradient(model, loss_fn, parameters)[1])
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
    ahead, behind = gradients
    return {name: (ahead[name].double() - behind[name].double()) / (2 * step) for name in ahead}


def central_difference(
    model: nn.Module, loss_fn: LossFunction, tangent: NamedTensors, relative_step: float
) -> Reference:
    """`H v` from differences of gradients, sharing no second-derivative code with the other truths.

    `D(h) = (g(w + h v) - g(w - h v)) / (2 h)` at `h`, `h/2`, `h/4`, each formed in float64, and extrapolated twice
    (Richardson): `R_k = (4 D_{k+1} - D_k) / 3`, `(16 R_1 - R_0) / 15`, whose truncation error is O(h^6).

    Args:
        model: any module; its parameters are restored bit for bit. Use float64: in float32 the differences
            lose half of the digits, and which step is best varies by orders of magnitude with `v`.
        loss_fn: as in `double_backward`.
        tangent: `v`.
        relative_step: `h ||v|| / ||w||` with `w` the variables; 1e-3 suits float64.

    Returns:
        `relative_error_estimate` is `||R_1 - R_0|| / ||R||`: the error of the worse extrapolation, hence an
        upper estimate of truncation that also shows the rounding.
    """
    assert relative_step > 0, f"relative_step {relative_step}"
    parameters = _parameters(model, tangent)
    direction, rows = _free_tangent(model, tangent)
    loss, gradient = _gradient(model, loss_fn, parameters)
    zero_frozen_rows_(gradient, rows)
    if _norm(direction) == 0:
        return Reference(loss, gradient, {name: torch.zeros_like(value) for name, value in direction.items()}, 0.0)
    step = relative_step * _norm(parameters) / _norm(direction)
    assert step > 0, "all variables are zero, so no step can be relative to them"
    d0, d1, d2 = (_difference(model, loss_fn, parameters, direction, step / factor) for factor in (1, 2, 4))
    r0 = zero_frozen_rows_({name: (4 * d1[name] - d0[name]) / 3 for name in d0}, rows)
    r1 = zero_frozen_rows_({name: (4 * d2[name] - d1[name]) / 3 for name in d0}, rows)
    product = {name: (16 * r1[name] - r0[name]) / 15 for name in r0}
    spread = _norm({name: r1[name] - r0[name] for name in r0})
    return Reference(loss, gradient, product, spread / max(_norm(product), 1e-300))


def gauss_newton_product(
    model: nn.Module,
    logits_fn: Callable[[nn.Module], Tensor],
    loss_of_logits: Callable[[Tensor], Tensor],
    tangent: NamedTensors,
) -> Reference:
    """`G v = J' H_loss J v`, the generalised Gauss-Newton product (Schraudolph 2002), `J = d logits / d w`.

    `J v` comes from two reverse passes (the derivative of `u -> J'u` along `v`), so no forward-mode rule is
    involved. `H_loss` is the exact Hessian of `loss_of_logits`: positive semidefinite for a convex loss only,
    so not for losses that push probability away.

    Args:
        model: any module; its parameters are not changed.
        logits_fn: the outputs at which the function is linearised, any shape.
        loss_of_logits: scalar loss of those outputs.
        tangent: `v`.
    """
    parameters = _parameters(model, tangent)
    direction, rows = _free_tangent(model, tangent)
    variables = tuple(parameters.values())
    with exact_attention(), torch.enable_grad():
        logits = logits_fn(model)
        dummy = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, variables, dummy, create_graph=True, materialize_grads=True)
        (logits_tangent,) = torch.autograd.grad(_dot(pulled, direction), dummy, retain_graph=True)
        leaf = logits.detach().requires_grad_()
        loss = loss_of_logits(leaf)
        (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
        if slope.requires_grad:
            (curved,) = torch.autograd.grad(slope, leaf, logits_tangent, materialize_grads=True)
        else:
            curved = torch.zeros_like(leaf)
        gradient = torch.autograd.grad(logits, variables, slope.detach(), retain_graph=True, materialize_grads=True)
        product = torch.autograd.grad(logits, variables, curved, materialize_grads=True)
    return Reference(loss.detach(), _named(parameters, gradient, rows), _named(parameters, product, rows))
