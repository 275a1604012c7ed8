"""What a linearisation keeps for a micro-batch, measured on one: between products, and between segments of a pass."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_unlearn.curvature.forward import evaluate_blocks
from distributed_unlearn.curvature.gradient_graph import HeldStorages
from distributed_unlearn.curvature.operators import Product, operator_of
from distributed_unlearn.curvature.recording import Recording, first_of, gather_block, run_block
from distributed_unlearn.curvature.segments import SegmentedModel
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.curvature.sweep import Sweep
from distributed_unlearn.curvature.trace import LossShare, Trace, trace_forward


@dataclass(frozen=True)
class KeptBytes:
    """Bytes on one rank. Each storage counts once; what the model owns anyway and the batch itself do not count."""

    weights: int
    """Gathered weights of root and blocks, which cached mode keeps once; 0 where weights are replicated."""
    graphs: int
    """What each micro-batch adds in cached mode: gradient graphs of root and blocks. 0 where no product was named."""
    forward_graphs: int
    """What each micro-batch adds to a gradient that keeps its blocks' graphs from forward to backward."""
    inputs: int
    """What each micro-batch adds between two segments of a pass that keeps no graphs: block inputs with their
    tangents, and what else blocks are called with."""

    def cached(self, num_micro_batches: int) -> int:
        """What cached mode keeps between products."""
        return self.weights + num_micro_batches * self.graphs


def measure_kept(
    segmented: SegmentedModel, store: SegmentStore, share: LossShare, product: Product | None
) -> KeptBytes:
    """Run one micro-batch forward, and build the graphs of one block, which stands for all of them, and of the root.

    In memory at its peak: what a gradient needs with recomputed segments; with a `product`, the root's and one
    block's part of what cached mode keeps. All ranks must call this.
    """
    model = segmented.model
    given = [tensor for tensor in (*share.inputs.values(), share.positions) if isinstance(tensor, Tensor)]
    held = HeldStorages([*model.parameters(), *model.buffers(), *given])
    num_blocks = len(segmented.blocks)
    with held.watching(), torch.enable_grad():
        recording = Recording.start(store, 1)
        [trace] = recording.traces
        evaluate, finished = partial(evaluate_blocks, store, recording), partial(_finish, trace, product is None)
        trace_forward([trace], [share], segmented, recording.root_leaves, evaluate, finished)
        sweep = Sweep(store, operator_of(product or "hessian"), [share], recording, None, None, None, keep=True)
        root_weights = sum(held.sizes_of(recording.root_leaves.values()).values())
        # Before the root's graphs, so that the two are not in memory together.
        block = _measure_block(held, store, recording, sweep, product) if num_blocks > 0 else _Block(0, 0, 0)
        hiddens = held.sizes_of([*trace.inputs, *trace.cuts])
        others = _total(held.sizes_of(tensor for call in trace.calls for tensor in call.tensors()), without=hiddens)
        root_graphs = 0 if product is None else _measure_root(held, recording, sweep)
    # Blocks may differ in size (a mixture of experts behind a dense first layer, the stages of a ResNet).
    sizes = [sum(slot.numel for slot in (*part.trainable, *part.frozen)) for part in store.layout.segments[1:]]
    return KeptBytes(
        weights=root_weights + (block.weights * sum(sizes) // sizes[0] if num_blocks > 0 and sizes[0] > 0 else 0),
        graphs=root_graphs + num_blocks * block.graphs,
        forward_graphs=sum(hiddens.values()) + others + num_blocks * block.forward_graphs,
        inputs=2 * sum(hiddens.values()) + others,
    )


class _Block(NamedTuple):
    weights: int
    forward_graphs: int
    graphs: int


def _measure_block(
    held: HeldStorages, store: SegmentStore, recording: Recording, sweep: Sweep, product: Product | None
) -> _Block:
    [trace], weights = recording.traces, gather_block(store, 0)
    of_weights = held.sizes_of(weights.named.values())
    known = {**held.sizes(trace.tensors()), **of_weights}
    leaf, output = run_block(trace, 0, weights)
    forward_graphs, graphs = _total(held.sizes([]), without=known), 0
    if product is not None:
        recording.outputs[0, 0] = leaf, first_of(output)
        graph, _ = sweep.block_graph(0, 0, weights, None)
        graphs = _total(held.sizes(graph.tensors()), without=known)
        del recording.graphs[0, "block 0"]
    return _Block(sum(of_weights.values()), forward_graphs, graphs)


def _measure_root(held: HeldStorages, recording: Recording, sweep: Sweep) -> int:
    sweep.root_graphs()
    kept = [tensor for graph in recording.graphs.values() for tensor in graph.tensors()]
    return _total(
        held.sizes([*(tensor for trace in recording.traces for tensor in trace.tensors()), *kept]),
        without=held.sizes_of(recording.root_leaves.values()),
    )


def _finish(trace: Trace, drop: bool, number: int) -> None:
    """Where no product is wanted the head's graph has no use."""
    del number
    if drop:
        trace.logits = trace.loss = None


def _total(sizes: dict[int, int], without: Iterable[int]) -> int:
    excluded = set(without)
    return sum(size for address, size in sizes.items() if address not in excluded)
