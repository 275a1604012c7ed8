"""Dense truths from `torch.func`: forward over reverse, so no code in common with double backward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jvp


class FreeEntries:
    """The entries of some parameters as one vector, without the rows that are held fixed.

    A fixed row is a constant of the function here, so forward mode cannot see it as a variable.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rows: dict[str, int]) -> None:
        parameters = dict(model.named_parameters())
        self.model = model
        self.base = {name: parameters[name].detach().clone() for name in names}
        self.free = {name: torch.ones_like(value, dtype=torch.bool) for name, value in self.base.items()}
        for name, row in rows.items():
            if name in self.free:
                self.free[name][row] = False

    def flatten(self, vector: dict[str, Tensor]) -> Tensor:
        return torch.cat([vector[name][free] for name, free in self.free.items()])

    def parameters_at(self, flat: Tensor) -> dict[str, Tensor]:
        counts = [int(free.sum()) for free in self.free.values()]
        named = {}
        for (name, free), part in zip(self.free.items(), flat.split(counts), strict=True):
            index = free.reshape(-1).nonzero().squeeze(1)
            named[name] = self.base[name].reshape(-1).index_copy(0, index, part).view(free.shape)
        return named

    def bind(self, function: Callable[[nn.Module], Tensor]) -> Callable[[Tensor], Tensor]:
        """`function(model)` as a function of the free entries; tied weights stay tied."""
        return lambda flat: functional_call(_Call(self.model, function), self._prefixed(flat), ())

    def _prefixed(self, flat: Tensor) -> dict[str, Tensor]:
        return {f"model.{name}": value for name, value in self.parameters_at(flat).items()}

    @property
    def point(self) -> Tensor:
        return self.flatten(self.base)


class _Call(nn.Module):
    """Makes `function(model)` a forward call, which is what `functional_call` can rebind parameters of."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Tensor:
        return self.function(self.model)


def dense_hessian(entries: FreeEntries, loss_fn: Callable[[nn.Module], Tensor], vectorised: bool = True) -> Tensor:
    """[n, n] over the free entries. `vectorised=False` for models with `layer_norm`: one column at a time.

    vmap's rule for the backward of `layer_norm` is wrong (pytorch/functorch issue 534, torch 2.13): GPT-NeoX's
    vectorised Hessian is off by 11 % and not symmetric, hence the assertion.
    """
    if vectorised:
        matrix = hessian(entries.bind(loss_fn))(entries.point)
    else:
        units = torch.eye(entries.point.numel(), dtype=entries.point.dtype)
        matrix = torch.stack([forward_over_reverse(entries, loss_fn, unit) for unit in units], dim=1)
    asymmetry = float((matrix - matrix.T).norm() / matrix.norm())
    assert asymmetry < 1e-12, f"this truth is none: asymmetry {asymmetry:.1e}"
    return matrix


def dense_gauss_newton(
    entries: FreeEntries,
    logits_fn: Callable[[nn.Module], Tensor],
    loss_of_logits: Callable[[Tensor], Tensor],
) -> Tensor:
    """`J' H_loss J` [n, n] over the free entries."""
    jacobian = jacfwd(entries.bind(logits_fn))(entries.point)
    jacobian = jacobian.reshape(-1, jacobian.shape[-1])
    logits = entries.bind(logits_fn)(entries.point).detach()
    curvature = hessian(loss_of_logits)(logits).reshape(logits.numel(), logits.numel())
    return jacobian.T @ curvature @ jacobian


def forward_over_reverse(entries: FreeEntries, loss_fn: Callable[[nn.Module], Tensor], tangent: Tensor) -> Tensor:
    """`H v` [n] as the forward derivative of the gradient."""
    return jvp(grad(entries.bind(loss_fn)), (entries.point,), (tangent,))[1]
