"""A differentiable map with its pulled-back cotangent: the building block of every curvature product."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

MaybeTensors = list[Tensor | None]


def edge_of(output: Tensor | GradientEdge | None) -> GradientEdge | None:
    """Where `output` hangs on its graph, without its value; None where it has no graph."""
    if isinstance(output, Tensor):
        return get_gradient_edge(output) if output.requires_grad else None
    return output


def partial_grad(
    outputs: Sequence[Tensor | GradientEdge | None],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    create_graph: bool = False,
    retain_graph: bool = False,
) -> MaybeTensors:
    """`sum_k seeds[k]' d outputs[k] / d inputs`; None where nothing reaches an input.

    Outputs without a graph and missing seeds stand for zero; a scalar output needs a seed like any other.
    """
    edges = [edge_of(output) for output in outputs]
    live = [(edge, seed) for edge, seed in zip(edges, seeds, strict=True) if edge is not None and seed is not None]
    if not live or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [edge for edge, _ in live],
            inputs,
            [seed for _, seed in live],
            create_graph=create_graph,
            retain_graph=retain_graph or create_graph,
            allow_unused=True,
        )
    )


@dataclass(frozen=True)
class GradientGraph:
    """`J'c` of `output = f(leaves)` for a cotangent `c`, ready to be differentiated once more.

    It keeps the places of output and gradients in the graph, not their values: a gradient is as large as the
    weights, and once it is added up nothing needs it.
    """

    leaves: list[Tensor]
    cotangent: Tensor
    output: GradientEdge | None
    gradients: list[GradientEdge | None]

    @classmethod
    def build(
        cls, output: Tensor, leaves: list[Tensor], cotangent: Tensor, differentiable: bool, retain: bool
    ) -> tuple["GradientGraph", MaybeTensors]:
        """Pull `cotangent` back through `output`.

        Args:
            output: the map's value, with its graph.
            leaves: what it depends on.
            cotangent: same shape as `output`.
            differentiable: keep the gradients' own graph, for second derivatives and `push_forward`.
            retain: keep the output's graph, for the Gauss-Newton product or for shared nodes.

        Returns:
            The graph, and the values of `J'c`, one for each leaf, detached; None where nothing reaches a leaf.
        """
        if differentiable:
            cotangent = cotangent.detach().requires_grad_()
        gradients = partial_grad([output], leaves, [cotangent], create_graph=differentiable, retain_graph=retain)
        graph = cls(leaves, cotangent, edge_of(output), [edge_of(gradient) for gradient in gradients])
        return graph, [None if gradient is None else gradient.detach() for gradient in gradients]

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held beside what the graph's nodes save."""
        return [*self.leaves, self.cotangent]

    def pull_back(
        self, tangents: Sequence[Tensor | None], cotangent_tangent: Tensor | None, retain: bool
    ) -> MaybeTensors:
        """Tangents of `J'c` along `tangents` of the leaves and `cotangent_tangent` of the cotangent.

        `d/d leaves [ sum_k <(J'c)[k], tangents[k]> + <output, dc> ]`, because `c'f` has a symmetric Hessian; needs
        `differentiable`.
        """
        outputs = [*self.gradients, self.output]
        return partial_grad(outputs, self.leaves, [*tangents, cotangent_tangent], retain_graph=retain)

    def pull_back_linear(self, cotangent_tangent: Tensor | None, retain: bool) -> MaybeTensors:
        """`J' cotangent_tangent` alone: what `pull_back` is of a map without second derivative."""
        return partial_grad([self.output], self.leaves, [cotangent_tangent], retain_graph=retain)

    def push_forward(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """`J tangents`, as the gradient of `<J'c, tangents>` by `c`; needs `differentiable`."""
        found = partial_grad(self.gradients, [self.cotangent], tangents, retain_graph=True)[0]
        return torch.zeros_like(self.cotangent) if found is None else found


def push_forward(output: Tensor, leaves: list[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """`J tangents` of a graph-attached `output`, in reverse mode only (twice `J'`)."""
    if not output.requires_grad:
        return torch.zeros_like(output)
    return GradientGraph.build(output, leaves, torch.zeros_like(output), True, True)[0].push_forward(tangents)


class _Saved:
    """What a graph's node holds in place of a tensor that it saves; dies with the node."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class HeldStorages:
    """The storages that autograd graphs keep alive, each counted once.

    Args:
        owned_elsewhere: tensors whose storages are not counted, such as the model's own parameters.
    """

    def __init__(self, owned_elsewhere: Iterable[Tensor]) -> None:
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in owned_elsewhere}
        self._saved: WeakSet[_Saved] = WeakSet()

    def _save(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # an output that its own node saved would keep the node alive for ever
        self._saved.add(saved)
        return saved

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which graphs are built that are to be counted."""
        with saved_tensors_hooks(self._save, lambda saved: saved.tensor):
            yield

    def sizes(self, tensors: Iterable[Tensor]) -> dict[int, int]:
        """`{address: bytes}` of all storages that watched graphs hold now, and of those of `tensors`."""
        return self.sizes_of([*(saved.tensor for saved in self._saved), *tensors])

    def sizes_of(self, tensors: Iterable[Tensor]) -> dict[int, int]:
        """`{address: bytes}` of the storages of `tensors`."""
        storages = [tensor.untyped_storage() for tensor in tensors]
        return {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in self._ignored}
