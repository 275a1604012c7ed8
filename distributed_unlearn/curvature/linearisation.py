"""Loss, gradient and exact curvature products of one micro-batch, segment by segment.

A segment `o = f(h, w)` with cotangent `c` contributes `(g_h, g_w) = J'c` to the gradient. For tangents
`(dh, dw)` and `dc`, the tangents of `(g_h, g_w)` are one reverse pass over the segment's gradient graph
(`GradientGraph.pull_back`). The output tangent `do = J(dh, dw)` comes from forward-mode AD where nothing is
kept, or from differentiating `J'c` by `c` where the gradient graph is kept. With F the matrix products of a
forward pass (a gradient costs 3F, 4F with recomputation):

- `recompute` keeps each block's input: 3F for the tangent sweep, F + 2F + 6F for the reverse sweep, the
  gradient included; one block's weights and graph in memory at a time;
- `cached` keeps every block's gradient graph and weights: 8F for each product after the first gradient.

Reverse mode carries everything but the tangent sweep of `recompute`, which runs with grad mode off; so the
only kernels that must be avoided are those without second derivative or forward-mode rule (fused attention,
DeepSpeed's memory-efficient linear).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from distributed_unlearn.curvature.gradient_graph import (
    GradientGraph,
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
        loss_of_logits: this rank's share of the objective, from logits [B, T, V] to a scalar.
        product: `hessian` is d2L/dw2, `gauss_newton` is J' (d2L/dlogits2) J with J = dlogits/dw.
        cached: keep every block's gradient graph between products.
        keep_forward: keep the blocks' graphs from forward to backward (a gradient then costs 3F, not 4F).
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
    ) -> None:
        self._segmented, self._store, self._inputs = segmented, store, inputs
        self._loss_of_logits, self._product, self._cached = loss_of_logits, product, cached
        self._keep_forward = cached or keep_forward
        self._trace: Trace | None = None
        self._graphs: dict[str, GradientGraph] = {}
        self._block_outputs: dict[int, tuple[list[Tensor], Tensor]] = {}

    def loss(self) -> Tensor:
        """This rank's share of the objective, detached; one forward pass. All ranks must call this."""
        kept = self._trace
        with torch.no_grad():
            loss = self._run_model(self._evaluate_block).loss
        self._trace = kept
        assert loss is not None
        return loss

    def gradient(self, into: Tensor) -> Tensor:
        """Add the gradient, summed over ranks, to `into` (a sharded vector). All ranks must call this.

        Returns:
            This rank's share of the objective, detached.
        """
        self._new_trace(self._keep_block if self._keep_forward else self._evaluate_block)
        return self._sweep(None, into, None)

    def product(self, vector: Tensor, into: Tensor, gradient_into: Tensor | None = None) -> Tensor:
        """Add the product with `vector` to `into`; also the gradient where `gradient_into` is given.

        Both are sharded vectors, summed over ranks. All ranks must call this.

        Returns:
            This rank's share of the objective, detached.
        """
        tangents = _Tangents(vector, list(self._store.tangent(0, vector).values()), [], [])
        if not self._cached:
            self._new_trace(lambda index, call, hidden: self._evaluate_dual(index, call, hidden, tangents))
            return self._sweep(tangents, gradient_into, into)
        if self._trace is None:
            self.gradient(torch.zeros_like(into) if gradient_into is None else gradient_into)
        elif gradient_into is not None:
            raise AssertionError("cached mode computes the gradient once, before the first product")
        for index, expression in enumerate(self._traced.inputs):
            hidden = self._expression_tangent(expression, tangents)
            weights = self._store.tangent(index + 1, vector).values()
            tangents.hiddens.append(hidden)
            tangents.cuts.append(self._graphs[f"block {index}"].push_forward([hidden, *weights]))
        return self._sweep(tangents, None, into)

    def measure_cached_bytes(self) -> int:
        """Bytes that cached mode would keep for this micro-batch: one block and the head are built, the rest scaled.

        Counts each storage once, gathered weights included. All ranks must call this.
        """
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        self._new_trace(self._evaluate_block)
        trace, total = self._traced, 0
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            if trace.calls:
                leaves, output = self._run_block(0, trace.calls[0], trace.inputs[0])
                GradientGraph.build(_first(output), leaves, torch.zeros_like(_first(output)), True, True)
                total = sum(sizes.values()) * len(trace.calls)
                sizes.clear()
            self._new_trace(self._evaluate_block)
            loss, leaves = self._traced.loss, [*self._traced.cuts, *self._root]
            assert loss is not None
            GradientGraph.build(loss, leaves, torch.ones_like(loss), True, True)
        self._trace = None
        return total + sum(sizes.values())

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
        trace_forward(self._trace, model, blocks, self._inputs, self._loss_of_logits, evaluate_block)
        return self._trace

    def _new_trace(self, evaluate_block: BlockEvaluator) -> None:
        self._graphs, self._block_outputs = {}, {}
        with torch.enable_grad():
            self._run_model(evaluate_block)

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

    def _evaluate_dual(self, index: int, call: BlockCall, hidden: Tensor, tangents: _Tangents) -> Any:
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

    def _sweep_head(self, tangents: _Tangents | None, primal: _Sums, dual: _Sums) -> None:
        trace, leaves = self._traced, [*self._traced.cuts, *self._root]
        assert trace.loss is not None and trace.logits is not None
        if self._product == "gauss_newton" and tangents is not None:
            graph, seed = self._logits_graph(trace, leaves, [*tangents.cuts, *tangents.root])
        else:
            needs_second = self._cached or tangents is not None
            graph = self._graph("loss", trace.loss, leaves, torch.ones_like(trace.loss), needs_second)
            seed = None
        primal.add(graph.gradients, len(trace.cuts))
        if tangents is not None:
            found = graph.pull_back([*tangents.cuts, *tangents.root], seed, self._product, retain=True)
            dual.add(found, len(trace.cuts))

    def _logits_graph(
        self, trace: Trace, leaves: list[Tensor], tangents: MaybeTensors
    ) -> tuple[GradientGraph, Tensor | None]:
        """The head cut at the logits, and `H_loss dlogits`, the cotangent of the Gauss-Newton product."""
        assert trace.logits is not None
        logits = trace.logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._loss_of_logits(logits)
            slope = partial_grad([loss], [logits], [torch.ones_like(loss)], create_graph=True)[0]
            cotangent = torch.zeros_like(logits) if slope is None else slope
            graph = self._graph("logits", trace.logits, leaves, cotangent.detach(), True)
            return graph, partial_grad([cotangent], [logits], [graph.push_forward(tangents)])[0]

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
        graph = self._block_graph(index, cotangent, tangents is not None)
        self._scatter(index + 1, graph.gradients[1:], gradient)
        if tangents is None:
            return graph.gradients[0], None
        directions = self._store.tangent(index + 1, tangents.vector).values()
        found = graph.pull_back(
            [tangents.hiddens[index], *directions], cotangent_tangent, self._product, retain=self._cached
        )
        self._scatter(index + 1, found[1:], product)
        return graph.gradients[0], found[0]

    def _block_graph(self, index: int, cotangent: Tensor | None, needs_second: bool) -> GradientGraph:
        key = f"block {index}"
        if key in self._graphs:
            return self._graphs[key]
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
        graph = self._graph(f"input {index}", expression, [*cuts, *self._root], seed, needs_second)
        primal.add(graph.gradients, index)
        if tangents is not None:
            found = graph.pull_back([*tangents.cuts[:index], *tangents.root], cotangent_tangent, self._product, True)
            dual.add(found, index)

    def _graph(
        self, key: str, output: Tensor, leaves: list[Tensor], cotangent: Tensor, differentiable: bool
    ) -> GradientGraph:
        if key in self._graphs:
            return self._graphs[key]
        graph = GradientGraph.build(output, leaves, cotangent, differentiable, retain=True)
        if self._cached:
            self._graphs[key] = graph
        return graph

    def _scatter(self, segment: int, results: MaybeTensors, into: Tensor | None) -> None:
        if into is not None:
            names = self._store.trainable(segment)
            detached = [None if result is None else result.detach() for result in results]
            self._store.accumulate(segment, dict(zip(names, detached, strict=True)), into)
