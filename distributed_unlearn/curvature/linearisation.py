"""Loss, gradient and exact curvature products of some micro-batches, segment by segment.

A segment `o = f(h, w)` with cotangent `c` contributes `(g_h, g_w) = J'c` to the gradient. For tangents
`(dh, dw)` and `dc`, the tangents of `(g_h, g_w)` are one reverse pass over the segment's gradient graph
(`GradientGraph.pull_back`). The output tangent `do = J(dh, dw)` comes from forward-mode AD where nothing is
kept, or from differentiating `J'c` by `c` where the gradient graph is kept. With F the matrix products of a
forward pass (a gradient costs 3F, 4F with recomputation):

- `recompute` keeps each block's input: 3F for the tangent sweep, F + 2F + 6F for the reverse sweep, the
  gradient included; one block's weights in memory at a time, and one micro-batch's graph of it;
- `cached` keeps every block's gradient graph for every micro-batch, and its weights once for all of them: 8F for
  each product after the first gradient.

Either way a pass gathers a segment's weights and its slice of the direction once for all micro-batches, and scatters
a result once; what it holds in between, for each micro-batch, is in `Recording`. Between calls only `cached` keeps
anything; and of a gradient only its graph, never its full-size value.

Reverse mode carries everything but the tangent sweep of `recompute`, which runs with grad mode off; so the
only kernels that must be avoided are those without second derivative (fused attention, DeepSpeed's memory-efficient
linear). A block without a forward-mode rule is pushed forward in reverse mode, at twice the cost.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distributed_unlearn.curvature.forward import evaluate_blocks, keep_blocks, push_blocks, push_through_graphs
from distributed_unlearn.curvature.operators import Product, operator_of
from distributed_unlearn.curvature.recording import Recording, Tangents
from distributed_unlearn.curvature.segments import SegmentedModel
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.curvature.sweep import Sweep
from distributed_unlearn.curvature.trace import LossShare, trace_forward


class Linearisation:
    """Some micro-batches at fixed weights, ready for a gradient and for products.

    All ranks must call the same methods in the same order, each on as many micro-batches of its own (empty ones
    included): weights are gathered and results scattered segment by segment.

    Args:
        segmented: the model and its segments; the model in `eval()` mode.
        store: weights and tangents of a segment, sums of its results.
        shares: the micro-batches, at least one. Their order is the order of summation.
        product: `hessian` is d2L/dw2, `gauss_newton` is J' (d2L/dlogits2) J with J = dlogits/dw.
        cached: keep every block's gradient graph between products.
        keep_forward: keep the blocks' graphs from forward to backward (a gradient then costs 3F, not 4F).
    """

    def __init__(
        self,
        segmented: SegmentedModel,
        store: SegmentStore,
        shares: Sequence[LossShare],
        product: Product = "hessian",
        cached: bool = False,
        keep_forward: bool = False,
    ) -> None:
        assert shares, "no micro-batch: a rank without records takes part with an empty one"
        self._segmented, self._store = segmented, store
        self._shares = tuple(share.in_dtype(store.compute_dtype) for share in shares)
        self._operator, self._cached, self._keep_forward = operator_of(product), cached, cached or keep_forward
        self._recording: Recording | None = None
        """What cached mode keeps between calls."""
        self._reverse_only: set[int] = set()

    @property
    def reverse_only(self) -> frozenset[int]:
        """Blocks that turned out to be without a forward-mode rule. Not collective."""
        return frozenset(self._reverse_only)

    def loss(self) -> Tensor:
        """This rank's share of the objective: a float64 scalar without a graph. All ranks must call this."""
        with torch.no_grad():
            recording = Recording.start(self._store, len(self._shares))

            def drop_logits(number: int) -> None:
                recording.traces[number].logits = None

            self._run_model(recording, partial(evaluate_blocks, self._store, recording, forget=True), drop_logits)
        return recording.loss()

    def gradient(self, into: Tensor) -> Tensor:
        """Add the gradient, summed over ranks, to `into` (a sharded vector). All ranks must call this.

        Returns:
            This rank's share of the objective: a float64 scalar without a graph.
        """
        return self._forward_and_back(None, into, None).loss()

    def product(self, vector: Tensor, into: Tensor, gradient_into: Tensor | None = None) -> Tensor:
        """Add the product with `vector` to `into`; also the gradient where `gradient_into` is given.

        Both are sharded vectors, summed over ranks. All ranks must call this.

        Returns:
            This rank's share of the objective: a float64 scalar without a graph.
        """
        tangents = Tangents.along(self._store, vector, len(self._shares))
        if not self._cached:
            return self._forward_and_back(tangents, gradient_into, into).loss()
        recording = self._recording
        if recording is None:
            recording = self._forward_and_back(None, gradient_into, None)
        elif gradient_into is not None:
            raise AssertionError("cached mode computes the gradient once, before the first product")
        push_through_graphs(self._store, recording, tangents)
        sweep = self._sweep(recording, tangents, None, into)
        for number in range(len(self._shares)):
            sweep.head(number)
        sweep.blocks()
        return recording.loss()

    def _forward_and_back(
        self, tangents: Tangents | None, gradient: Tensor | None, product: Tensor | None
    ) -> Recording:
        self._recording = None  # before weights are gathered, so that two recordings are never in memory together
        with torch.enable_grad():
            recording = Recording.start(self._store, len(self._shares))
            sweep = self._sweep(recording, tangents, gradient, product)
            evaluate: Callable[[int], list[Any]]
            if tangents is not None:
                evaluate = partial(push_blocks, self._store, recording, tangents, self._reverse_only)
            else:
                evaluate = partial(keep_blocks if self._keep_forward else evaluate_blocks, self._store, recording)
            self._run_model(recording, evaluate, sweep.head)
        sweep.blocks()
        if self._cached:
            self._recording = recording
        return recording

    def _run_model(
        self, recording: Recording, evaluate: Callable[[int], list[Any]], finished: Callable[[int], None]
    ) -> None:
        trace_forward(recording.traces, self._shares, self._segmented, recording.root_leaves, evaluate, finished)

    def _sweep(
        self, recording: Recording, tangents: Tangents | None, gradient: Tensor | None, product: Tensor | None
    ) -> Sweep:
        return Sweep(
            self._store, self._operator, self._shares, recording, tangents, gradient, product, keep=self._cached
        )
