"""A differentiable map with its pulled-back cotangent: the building block of every curvature product."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Product = Literal["hessian", "gauss_newton"]
MaybeTensors = list[Tensor | None]


def partial_grad(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    create_graph: bool = False,
    retain_graph: bool = False,
) -> MaybeTensors:
    """`sum_k seeds[k]' d outputs[k] / d inputs`; None where nothing reaches an input.

    Outputs without a graph and missing seeds stand for zero; a scalar output needs a seed like any other.
    """
    live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o is not None and s is not None and o.requires_grad]
    if not live or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [o for o, _ in live],
            inputs,
            [s for _, s in live],
            create_graph=create_graph,
            retain_graph=retain_graph or create_graph,
            allow_unused=True,
        )
    )


@dataclass(frozen=True)
class GradientGraph:
    """`gradients = J'c` of `output = f(leaves)` for a cotangent `c`, optionally with its own graph."""

    leaves: list[Tensor]
    output: Tensor
    cotangent: Tensor
    gradients: MaybeTensors

    @classmethod
    def build(
        cls, output: Tensor, leaves: list[Tensor], cotangent: Tensor, differentiable: bool, retain: bool
    ) -> "GradientGraph":
        """Pull `cotangent` back through `output`.

        Args:
            output: the map's value, with its graph.
            leaves: what it depends on.
            cotangent: same shape as `output`.
            differentiable: keep the gradients' own graph, for second derivatives and `push_forward`.
            retain: keep the output's graph, for the Gauss-Newton product or for shared nodes.
        """
        if differentiable:
            cotangent = cotangent.detach().requires_grad_()
        gradients = partial_grad([output], leaves, [cotangent], create_graph=differentiable, retain_graph=retain)
        return cls(leaves, output, cotangent, gradients)

    def pull_back(
        self, tangents: MaybeTensors, cotangent_tangent: Tensor | None, product: Product, retain: bool
    ) -> MaybeTensors:
        """Tangents of `gradients` along `tangents` of the leaves and `cotangent_tangent` of the cotangent.

        Hessian: `d/d leaves [ sum_k <gradients[k], tangents[k]> + <output, dc> ]`, because `c'f` has a
        symmetric Hessian. Gauss-Newton: only the last term, `J'dc`.
        """
        if product == "gauss_newton":
            return partial_grad([self.output], self.leaves, [cotangent_tangent], retain_graph=retain)
        outputs = [*self.gradients, self.output]
        return partial_grad(outputs, self.leaves, [*tangents, cotangent_tangent], retain_graph=retain)

    def push_forward(self, tangents: MaybeTensors) -> Tensor:
        """`J tangents`, as the gradient of `<J'c, tangents>` by `c`; needs `differentiable`."""
        found = partial_grad(self.gradients, [self.cotangent], tangents, retain_graph=True)[0]
        return torch.zeros_like(self.output) if found is None else found


def push_forward(output: Tensor, leaves: list[Tensor], tangents: MaybeTensors) -> Tensor:
    """`J tangents` of a graph-attached `output`, in reverse mode only (twice `J'`)."""
    if not output.requires_grad:
        return torch.zeros_like(output)
    return GradientGraph.build(output, leaves, torch.zeros_like(output), True, True).push_forward(tangents)
