"""Loss, gradient and exact curvature products of one micro-batch, segment by segment.

A segment `o = f(h, w)` with cotangent `c` contributes `(g_h, g_w) = J'c` to the gradient. For tangents
`(dh, dw)` and `dc`, the tangents of `(g_h, g_w)` are one reverse pass over the segment's gradient graph
(`GradientGraph.pull_back`). The output tangent `do = J(dh, dw)` comes from forward-mode AD where nothing is
kept, or from differentiating `J'c` by `c` where the gradient graph is kept. With F the matrix products of a
forward pass (a gradient costs 3F, 4F with recomputation):

- `recompute` keeps each block's input: 3F for the tangent sweep, F + 2F + 6F for the reverse sweep, the
  gradient included; one block's weights and graph in memory at a time;
- `cached` keeps every block's gradient graph and weights: 8F for each product after the first gradient.

Between calls only `cached` keeps anything; and of a gradient only its graph, never its full-size value.

Reverse mode carries everything but the tangent sweep of `recompute`, which runs with grad mode off; so the
only kernels that must be avoided are those without second derivative or forward-mode rule (fused attention,
DeepSpeed's memory-efficient linear).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from distributed_unlearn.curvature.gradient_graph import (
    GradientGraph,
    HeldStorages,
    MaybeTensors,
    Product,
    partial_grad,
    push_forward,
)
from distributed_unlearn.curvature.segments import SegmentedModel
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.curvature.trace import BlockCall, BlockEvaluator, LossOfLogits, Trace, trace_forward


@dataclass
class _Tangents:
    """The direction of a product: the sharded vector, its root slice, and block inputs' and outputs' tangents."""

    vector: Tensor
    root: list[Tensor]
    hiddens: list[Tensor]
    cuts: list[Tensor]


class _Sums:
    """Cotangents of the cuts and full-size results of the root, summed over everything that uses them."""

    def __init__(self, num_cuts: int, num_root: int) -> None:
        self.cuts: MaybeTensors = [None] * num_cuts
        self.root: MaybeTensors = [None] * num_root

    def add(self, found: MaybeTensors, num_cuts: int) -> None:
        """`found` is ordered as cuts[:num_cuts], then the root's leaves."""
        for index, tensor in enumerate(found):
            if tensor is None:
                continue
            target, place = (self.cuts, index) if index < num_cuts else (self.root, index - num_cuts)
            previous = target[place]
            target[place] = tensor.detach() if previous is None else previous + tensor.detach()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class Linearisation:
    """One micro-batch at fixed weights, ready for a gradient and for products.

    All ranks must call the same methods in the same order, each on its own micro-batch (an empty one
    included): weights are gathered and results scattered segment by segment.

    Args:
        segmented: the model and its segments; the model in `eval()` mode.
        store: weights and tangents of a segment, sums of its results.
        inputs: keyword arguments of the model's forward, e.g. input_ids [B, T] and attention_mask [B, T].
        loss_of_logits: this rank's share of the objective, from logits to a scalar.
        product: `hessian` is d2L/dw2, `gauss_newton` is J' (d2L/dlogits2) J with J = dlogits/dw.
        cached: keep every block's gradient graph between products.
        keep_forward: keep the blocks' graphs from forward to backward (a gradient then costs 3F, not 4F).
        positions: int64 [N] into [B * T]: the loss is given the logits [N, V] of these alone, and no others are
            computed; None: it is given all that the model returns.
    """

    def __init__(
        self,
        segmented: SegmentedModel,
        store: SegmentStore,
        inputs: dict[str, Any],
        loss_of_logits: LossOfLogits,
        product: Product = "hessian",
        cached: bool = False,
        keep_forward: bool = False,
        positions: Tensor | None = None,
    ) -> None:
        self._segmented, self._store, self._inputs, self._positions = segmented, store, inputs, positions
        self._loss_of_logits, self._product, self._cached = loss_of_logits, product, cached
        self._keep_forward = cached or keep_forward
        self._trace: Trace | None = None
        self._graphs: dict[str, GradientGraph] = {}
        self._block_outputs: dict[int, tuple[list[Tensor], Tensor]] = {}

    def loss(self) -> Tensor:
        """This rank's share of the objective, detached; one forward pass. All ranks must call this."""
        kept = self._trace
        try:
            with torch.no_grad():
                loss = self._run_model(self._evaluate_block).loss
        finally:
            self._trace = kept
        assert loss is not None
        return loss

    def gradient(self, into: Tensor) -> Tensor:
        """Add the gradient, summed over ranks, to `into` (a sharded vector). All ranks must call this.

        Returns:
            This rank's share of the objective, detached.
        """
        evaluate_block = self._keep_block if self._keep_forward else self._evaluate_block
        return self._trace_and_sweep(evaluate_block, None, into, None)

    def product(self, vector: Tensor, into: Tensor, gradient_into: Tensor | None = None) -> Tensor:
        """Add the product with `vector` to `into`; also the gradient where `gradient_into` is given.

        Both are sharded vectors, summed over ranks. All ranks must call this.

        Returns:
            This rank's share of the objective, detached.
        """
        tangents = _Tangents(vector, list(self._store.tangent(0, vector).values()), [], [])
        if not self._cached:
            return self._trace_and_sweep(partial(self._evaluate_dual, tangents), tangents, gradient_into, into)
        if self._trace is None:
            self._trace_and_sweep(self._keep_block, None, gradient_into, None)
        elif gradient_into is not None:
            raise AssertionError("cached mode computes the gradient once, before the first product")
        for index, expression in enumerate(self._traced.inputs):
            hidden = self._expression_tangent(expression, tangents)
            weights = self._store.tangent(index + 1, vector).values()
            tangents.hiddens.append(hidden)
            tangents.cuts.append(self._graphs[f"block {index}"].push_forward([hidden, *weights]))
        return self._sweep(tangents, None, into)

    def measure_cached_bytes(self) -> int:
        """Bytes that cached mode would keep for this micro-batch: of the root, and of one block times their number.

        Counts each storage once, gathered weights included; not what the model owns anyway (replicated weights,
        buffers) nor the batch. All ranks must call this.
        """
        model, given = self._segmented.model, [t for t in self._inputs.values() if isinstance(t, Tensor)]
        held = HeldStorages([*model.parameters(), *model.buffers(), *given])
        other = Linearisation(
            self._segmented, self._store, self._inputs, self._loss_of_logits, self._product, True, True, self._positions
        )
        with held.watching():
            other._new_trace(other._evaluate_block)
            num_blocks, of_blocks = len(other._traced.calls), 0
            if num_blocks > 0:  # before the root's graphs, so that the two are not in memory together
                shared = held.sizes(other._traced.tensors())
                block, _ = other._block_graph(0, None, True)
                sizes = held.sizes(block.tensors())
                of_blocks = num_blocks * sum(size for address, size in sizes.items() if address not in shared)
                del block, other._graphs["block 0"]
            other._sweep_root()
        of_graphs = [tensor for graph in other._graphs.values() for tensor in graph.tensors()]
        return of_blocks + sum(held.sizes([*other._traced.tensors(), *of_graphs]).values())

    # -- forward ------------------------------------------------------------------------------------------

    @property
    def _traced(self) -> Trace:
        assert self._trace is not None
        return self._trace

    @property
    def _root(self) -> list[Tensor]:
        return [self._traced.root_leaves[name] for name in self._store.trainable(0)]

    def _root_leaves(self) -> dict[str, Tensor]:
        names = set(self._store.trainable(0)) if torch.is_grad_enabled() else set()
        return {name: weight.detach().requires_grad_(name in names) for name, weight in self._store.weights(0).items()}

    def _run_model(self, evaluate_block: BlockEvaluator) -> Trace:
        """Trace one forward pass; `self._trace` is visible to `evaluate_block` while it grows."""
        self._trace = Trace(self._root_leaves())
        model, blocks = self._segmented.model, self._segmented.blocks
        inputs = {**self._segmented.constants, **self._inputs}
        trace_forward(self._trace, model, blocks, inputs, self._loss_of_logits, evaluate_block, self._positions)
        return self._trace

    def _release(self) -> None:
        self._trace, self._graphs, self._block_outputs = None, {}, {}

    def _new_trace(self, evaluate_block: BlockEvaluator) -> None:
        self._release()  # before weights are gathered, so that two traces are never in memory together
        with torch.enable_grad():
            self._run_model(evaluate_block)

    def _trace_and_sweep(
        self,
        evaluate_block: BlockEvaluator,
        tangents: _Tangents | None,
        gradient: Tensor | None,
        product: Tensor | None,
    ) -> Tensor:
        """Forward and back; what was kept on the way is dropped at the end unless it is complete and cached."""
        complete = False
        try:
            self._new_trace(evaluate_block)
            loss = self._sweep(tangents, gradient, product)
            complete = True
        finally:
            if not (complete and self._cached):
                self._release()
        return loss

    def _evaluate_block(self, index: int, call: BlockCall, hidden: Tensor) -> Any:
        with torch.no_grad():
            return call.run(self._store.weights(index + 1), hidden.detach())

    def _keep_block(self, index: int, call: BlockCall, hidden: Tensor) -> Any:
        leaves, output = self._run_block(index, call, hidden)
        self._block_outputs[index] = (leaves, _first(output))
        return output

    def _run_block(self, index: int, call: BlockCall, hidden: Tensor) -> tuple[list[Tensor], Any]:
        names = self._store.trainable(index + 1)
        weights = {n: w.detach().requires_grad_(n in names) for n, w in self._store.weights(index + 1).items()}
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = call.run(weights, leaf)
        return [leaf, *(weights[name] for name in names)], output

    def _evaluate_dual(self, tangents: _Tangents, index: int, call: BlockCall, hidden: Tensor) -> Any:
        tangent = self._expression_tangent(hidden, tangents)
        weights = self._store.weights(index + 1)
        directions = self._store.tangent(index + 1, tangents.vector)
        with torch.no_grad(), forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(w, directions[n]) if n in directions else w for n, w in weights.items()}
            output = call.run(duals, forward_ad.make_dual(hidden.detach(), tangent))
            parts = output if isinstance(output, tuple) else (output,)
            value, direction = forward_ad.unpack_dual(parts[0])
            rest = [forward_ad.unpack_dual(part).primal if isinstance(part, Tensor) else part for part in parts[1:]]
        tangents.hiddens.append(tangent)
        tangents.cuts.append(torch.zeros_like(value) if direction is None else direction)
        return (value, *rest) if isinstance(output, tuple) else value

    def _expression_tangent(self, expression: Tensor, tangents: _Tangents) -> Tensor:
        cuts = self._traced.cuts[: len(tangents.cuts)]
        if cuts and expression is cuts[-1]:  # nothing between the blocks: by far the commonest case
            return tangents.cuts[-1]
        return push_forward(expression, [*cuts, *self._root], [*tangents.cuts, *tangents.root])

    # -- backward -----------------------------------------------------------------------------------------

    def _sweep(self, tangents: _Tangents | None, gradient: Tensor | None, product: Tensor | None) -> Tensor:
        """From the loss back to the first segment; adds to the sharded vectors that are given."""
        trace = self._traced
        primal = _Sums(len(trace.cuts), len(self._root))
        dual = _Sums(len(trace.cuts), len(self._root))
        self._sweep_head(tangents, primal, dual)
        for index in reversed(range(len(trace.cuts))):
            hidden, hidden_tangent = self._sweep_block(index, tangents, primal, dual, gradient, product)
            self._sweep_input(index, hidden, hidden_tangent, tangents, primal, dual)
        self._scatter(0, primal.root, gradient)
        self._scatter(0, dual.root, product)
        assert trace.loss is not None
        return trace.loss.detach()

    def _sweep_root(self) -> None:
        """Build the graphs that cached mode keeps of the root, with zeros for what blocks would pull back."""
        trace = self._traced
        primal, dual = (_Sums(len(trace.cuts), len(self._root)) for _ in range(2))
        self._sweep_head(None, primal, dual)
        for index in reversed(range(len(trace.cuts))):
            self._sweep_input(index, None, None, None, primal, dual)

    def _sweep_head(self, tangents: _Tangents | None, primal: _Sums, dual: _Sums) -> None:
        trace, leaves = self._traced, [*self._traced.cuts, *self._root]
        directions: MaybeTensors | None = None if tangents is None else [*tangents.cuts, *tangents.root]
        needs_second = self._cached or directions is not None
        seed = None
        if self._product == "gauss_newton" and needs_second:
            graph, gradients, seed = self._logits_graph(trace, leaves, directions)
        else:
            assert trace.loss is not None
            one = torch.ones_like(trace.loss)
            graph, gradients = self._graph("loss", trace.loss, leaves, one, needs_second)
        primal.add(gradients, len(trace.cuts))
        if directions is not None:
            dual.add(graph.pull_back(directions, seed, self._product, retain=True), len(trace.cuts))

    def _logits_graph(
        self, trace: Trace, leaves: list[Tensor], tangents: MaybeTensors | None
    ) -> tuple[GradientGraph, MaybeTensors, Tensor | None]:
        """The head cut at the logits, its gradients, and `H_loss dlogits`, the Gauss-Newton product's cotangent."""
        assert trace.logits is not None and trace.loss is not None
        trace.loss = trace.loss.detach()  # the loss is differentiated below, by the logits; this graph has no use
        logits = trace.logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._loss_of_logits(logits)
            slope = partial_grad([loss], [logits], [torch.ones_like(loss)], create_graph=tangents is not None)[0]
            cotangent = torch.zeros_like(logits) if slope is None else slope
            graph, gradients = self._graph("logits", trace.logits, leaves, cotangent.detach(), True)
            if tangents is None:
                return graph, gradients, None
            return graph, gradients, partial_grad([cotangent], [logits], [graph.push_forward(tangents)])[0]

    def _sweep_block(
        self,
        index: int,
        tangents: _Tangents | None,
        primal: _Sums,
        dual: _Sums,
        gradient: Tensor | None,
        product: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        cotangent, cotangent_tangent = primal.cuts[index], dual.cuts[index]
        primal.cuts[index] = dual.cuts[index] = None
        graph, (hidden_gradient, *gradients) = self._block_graph(index, cotangent, tangents is not None)
        self._scatter(index + 1, gradients, gradient)
        if tangents is None:
            return hidden_gradient, None
        del gradients  # as large as the block's weights
        directions = self._store.tangent(index + 1, tangents.vector).values()
        found = graph.pull_back(
            [tangents.hiddens[index], *directions], cotangent_tangent, self._product, retain=self._cached
        )
        self._scatter(index + 1, found[1:], product)
        return hidden_gradient, found[0]

    def _block_graph(
        self, index: int, cotangent: Tensor | None, needs_second: bool
    ) -> tuple[GradientGraph, MaybeTensors]:
        key = f"block {index}"
        if key in self._graphs:
            return self._kept_graph(key)
        if index in self._block_outputs:
            leaves, output = self._block_outputs.pop(index)
        else:
            leaves, raw = self._run_block(index, self._traced.calls[index], self._traced.inputs[index])
            output = _first(raw)
        if cotangent is None:
            cotangent = torch.zeros_like(output)
        if self._cached:
            return self._graph(key, output, leaves, cotangent, True)
        second = needs_second and self._product == "hessian"
        return GradientGraph.build(output, leaves, cotangent, differentiable=second, retain=needs_second)

    def _sweep_input(
        self,
        index: int,
        cotangent: Tensor | None,
        cotangent_tangent: Tensor | None,
        tangents: _Tangents | None,
        primal: _Sums,
        dual: _Sums,
    ) -> None:
        """Pull the cotangent of block `index`'s input back to the previous cut and the root."""
        trace = self._traced
        expression, cuts = trace.inputs[index], trace.cuts[:index]
        if cuts and expression is cuts[-1]:
            primal.add([*[None] * (index - 1), cotangent], index)
            dual.add([*[None] * (index - 1), cotangent_tangent], index)
            return
        seed = torch.zeros_like(expression) if cotangent is None else cotangent.detach()
        needs_second = self._cached or tangents is not None
        graph, gradients = self._graph(f"input {index}", expression, [*cuts, *self._root], seed, needs_second)
        primal.add(gradients, index)
        if tangents is not None:
            found = graph.pull_back([*tangents.cuts[:index], *tangents.root], cotangent_tangent, self._product, True)
            dual.add(found, index)

    def _kept_graph(self, key: str) -> tuple[GradientGraph, MaybeTensors]:
        """A graph of an earlier sweep. That sweep used up the gradients, and later ones have no use for them."""
        graph = self._graphs[key]
        return graph, [None] * len(graph.leaves)

    def _graph(
        self, key: str, output: Tensor, leaves: list[Tensor], cotangent: Tensor, differentiable: bool
    ) -> tuple[GradientGraph, MaybeTensors]:
        if key in self._graphs:
            return self._kept_graph(key)
        graph, gradients = GradientGraph.build(output, leaves, cotangent, differentiable, retain=True)
        if self._cached:
            self._graphs[key] = graph
        return graph, gradients

    def _scatter(self, segment: int, results: MaybeTensors, into: Tensor | None) -> None:
        if into is not None:
            names = self._store.trainable(segment)
            detached = [None if result is None else result.detach() for result in results]
            self._store.accumulate(segment, dict(zip(names, detached, strict=True)), into)
