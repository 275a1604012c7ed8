"""From the losses back to the first segment: gradients and products, all micro-batches segment by segment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_unlearn.curvature.gradient_graph import GradientGraph, MaybeTensors
from distributed_unlearn.curvature.operators import CurvatureOperator
from distributed_unlearn.curvature.recording import (
    BlockWeights,
    Recording,
    Tangents,
    first_of,
    gather_block,
    run_block,
)
from distributed_unlearn.curvature.store import SegmentStore, SegmentSum
from distributed_unlearn.curvature.trace import LossShare


class _Cotangents:
    """Derivatives of the loss, or of its derivative along the direction: by the cuts, by the root's weights."""

    def __init__(self, num_micro_batches: int, num_blocks: int, root: SegmentSum | None) -> None:
        self.cuts: list[MaybeTensors] = [[None] * num_blocks for _ in range(num_micro_batches)]
        """By micro-batch, then block."""
        self.root = root
        """Summed over micro-batches; None where nobody asked for it."""

    def add(self, number: int, found: MaybeTensors, num_cuts: int) -> None:
        """`found` is ordered as cuts[:num_cuts], then the root's leaves if it reaches that far."""
        cuts = self.cuts[number]
        for index, tensor in enumerate(found[:num_cuts]):
            if tensor is not None:
                previous = cuts[index]
                cuts[index] = tensor.detach() if previous is None else previous + tensor.detach()
        if self.root is not None and len(found) > num_cuts:
            self.root.add(found[num_cuts:])

    def take(self, number: int, index: int) -> Tensor | None:
        """The cotangent of a cut, which is needed once."""
        found, self.cuts[number][index] = self.cuts[number][index], None
        return found


class Sweep:
    """One sweep over a recording: `head` for every micro-batch as soon as its forward is done, then `blocks` once.

    Micro-batches are added up in their order within each segment, in the dtype of the vectors.

    Args:
        store: weights and tangents of a segment, sums of its results.
        operator: what a product is with.
        shares: the micro-batches.
        recording: the forward pass; consumed block by block unless `keep`.
        tangents: the direction; None where no product is wanted.
        gradient: sharded vector that the gradient is added to; None where it is not wanted.
        product: the same for the product.
        keep: put every graph into the recording, or use those that are there.
    """

    def __init__(
        self,
        store: SegmentStore,
        operator: CurvatureOperator,
        shares: Sequence[LossShare],
        recording: Recording,
        tangents: Tangents | None,
        gradient: Tensor | None,
        product: Tensor | None,
        keep: bool,
    ) -> None:
        self._store, self._operator, self._shares, self._recording = store, operator, shares, recording
        self._tangents, self._gradient, self._product, self._keep = tangents, gradient, product, keep
        self._num_blocks = len(store.layout.segments) - 1
        self._primal, self._dual = (
            _Cotangents(len(shares), self._num_blocks, self._sum_of(0, vector)) for vector in (gradient, product)
        )

    def _sum_of(self, segment: int, into: Tensor | None) -> SegmentSum | None:
        return None if into is None else self._store.sum_of(segment, into)

    def _scatter(self, found: SegmentSum | None) -> None:
        if found is not None:
            found.scatter(self._store.collectives)

    def head(self, number: int) -> None:
        """Micro-batch `number` from its loss to its last cut; drops its logits unless they are kept. Not collective."""
        recording, tangents, trace = self._recording, self._tangents, self._recording.traces[number]
        leaves, directions = [*trace.cuts, *recording.root], None
        if tangents is not None:
            directions = [*tangents.cuts[number], *tangents.root]
        kept, second = recording.graphs.get((number, "head")), self._keep or directions is not None
        found = self._operator.head(trace, self._shares[number].loss, leaves, directions, kept, second)
        if self._keep:
            recording.graphs[number, "head"] = found.graph
        self._primal.add(number, found.gradients, self._num_blocks)
        if directions is not None:
            results = self._operator.pull_back(found.graph, directions, found.seed, retain=True)
            self._dual.add(number, results, self._num_blocks)
        if not self._keep:
            trace.logits = None
            trace.loss = None if trace.loss is None else trace.loss.detach()

    def blocks(self) -> None:
        """The blocks from last to first, then the root's results. All ranks must call this."""
        for index in reversed(range(self._num_blocks)):
            self._block(index)
        self._scatter(self._primal.root)
        self._scatter(self._dual.root)

    def root_graphs(self) -> None:
        """Build the graphs that are kept of the root, with zeros for what the blocks would pull back."""
        for number in range(len(self._shares)):
            self.head(number)
            for index in reversed(range(self._num_blocks)):
                self._input(number, index, None, None)

    def _block(self, index: int) -> None:
        store, recording, tangents = self._store, self._recording, self._tangents
        weights = recording.weights.get(index)
        # Graphs that are there already hold the weights that they need.
        if weights is None:
            weights = gather_block(store, index)
        directions = [] if tangents is None else list(store.tangent(index + 1, tangents.vector).values())
        gradient_sum, product_sum = (self._sum_of(index + 1, vector) for vector in (self._gradient, self._product))
        for number in range(len(self._shares)):
            cotangent, tangent = self._primal.take(number, index), self._dual.take(number, index)
            graph, (hidden_gradient, *gradients) = self.block_graph(number, index, weights, cotangent)
            if gradient_sum is not None:
                gradient_sum.add(gradients)
            del gradients  # as large as the block's weights
            hidden_tangent = None
            if tangents is not None:
                along = [tangents.hiddens[number][index], *directions]
                hidden_tangent, *products = self._operator.pull_back(graph, along, tangent, retain=self._keep)
                if product_sum is not None:
                    product_sum.add(products)
                del products
            del graph
            self._input(number, index, hidden_gradient, hidden_tangent)
            if not self._keep:
                recording.traces[number].forget_last_block()
        if not self._keep:
            recording.weights.pop(index, None)
        del weights, directions
        self._scatter(gradient_sum)
        self._scatter(product_sum)

    def block_graph(
        self, number: int, index: int, weights: BlockWeights, cotangent: Tensor | None
    ) -> tuple[GradientGraph, MaybeTensors]:
        """A block's gradient graph for one micro-batch, and the gradients of its input and weights."""
        recording, key = self._recording, (number, f"block {index}")
        if key in recording.graphs:
            return _used_up(recording.graphs[key])
        if (number, index) in recording.outputs:
            leaf, output = recording.outputs.pop((number, index))
        else:
            leaf, everything = run_block(recording.traces[number], index, weights)
            output = first_of(everything)
        if cotangent is None:
            cotangent = torch.zeros_like(output)
        second = self._tangents is not None
        graph, gradients = GradientGraph.build(
            output,
            [leaf, *weights.trainable],
            cotangent,
            differentiable=self._keep or (second and self._operator.differentiates_gradients),
            retain=self._keep or second,
        )
        if self._keep:
            recording.graphs[key] = graph
        return graph, gradients

    def _input(self, number: int, index: int, cotangent: Tensor | None, cotangent_tangent: Tensor | None) -> None:
        """Pull the cotangent of block `index`'s input back to the previous cut and the root."""
        recording, tangents, trace = self._recording, self._tangents, self._recording.traces[number]
        expression, cuts = trace.inputs[index], trace.cuts[:index]
        if cuts and expression is cuts[-1]:
            self._primal.add(number, [*[None] * (index - 1), cotangent], index)
            self._dual.add(number, [*[None] * (index - 1), cotangent_tangent], index)
            return
        key = (number, f"input {index}")
        if key in recording.graphs:
            graph, gradients = _used_up(recording.graphs[key])
        else:
            seed = torch.zeros_like(expression) if cotangent is None else cotangent.detach()
            second = self._keep or tangents is not None
            graph, gradients = GradientGraph.build(expression, [*cuts, *recording.root], seed, second, retain=True)
            if self._keep:
                recording.graphs[key] = graph
        self._primal.add(number, gradients, index)
        if tangents is not None:
            along = [*tangents.cuts[number][:index], *tangents.root]
            self._dual.add(number, self._operator.pull_back(graph, along, cotangent_tangent, retain=True), index)


def _used_up(graph: GradientGraph) -> tuple[GradientGraph, MaybeTensors]:
    """A graph of an earlier sweep. That sweep used up the gradients, and later ones have no use for them."""
    return graph, [None] * len(graph.leaves)
