"""What happens to a block on the way forward, for all micro-batches while its weights are gathered.

Each function returns everything the block returns, one entry for each micro-batch, for the models' forwards to go on
with; what the sweep back needs is noted in the recording and the tangents.
"""

from collections.abc import MutableSet
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from distributed_unlearn.curvature.gradient_graph import push_forward
from distributed_unlearn.curvature.recording import BlockWeights, Recording, Tangents, first_of, gather_block, run_block
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.curvature.trace import Trace


def evaluate_blocks(store: SegmentStore, recording: Recording, index: int, forget: bool = False) -> list[Any]:
    """Without any graph; with `forget`, keep nothing of the calls either. All ranks must call this."""
    weights, outputs = store.weights(index + 1), []
    with torch.no_grad():
        for trace in recording.traces:
            outputs.append(trace.calls[-1].run(weights, trace.inputs[-1].detach()))
            if forget:
                trace.forget_blocks()
    return outputs


def keep_blocks(store: SegmentStore, recording: Recording, index: int) -> list[Any]:
    """With graphs that stay, and weights that stay with them. All ranks must call this."""
    weights, outputs = gather_block(store, index), []
    recording.weights[index] = weights
    for number, trace in enumerate(recording.traces):
        leaf, output = run_block(trace, index, weights)
        recording.outputs[number, index] = leaf, first_of(output)
        outputs.append(output)
    return outputs


def push_blocks(
    store: SegmentStore, recording: Recording, tangents: Tangents, reverse_only: MutableSet[int], index: int
) -> list[Any]:
    """With tangents. All ranks must call this.

    Blocks without a forward-mode rule (a custom autograd function without `jvp`) are found out by trying, and put
    into `reverse_only`; no collective depends on it.
    """
    weights, directions = store.weights(index + 1), store.tangent(index + 1, tangents.vector)
    outputs = []
    for number, trace in enumerate(recording.traces):
        tangent = input_tangent(recording, tangents, number, index)
        found = None
        if index not in reverse_only:
            try:
                found = _push_dual(trace, index, weights, directions, tangent)
            except NotImplementedError:
                reverse_only.add(index)
        output, direction = found or _push_in_reverse(trace, index, weights, directions, tangent)
        tangents.hiddens[number].append(tangent)
        tangents.cuts[number].append(direction)
        outputs.append(output)
    return outputs


def push_through_graphs(store: SegmentStore, recording: Recording, tangents: Tangents) -> None:
    """Tangents of all cuts, from gradient graphs that were kept. All ranks must call this."""
    for index in range(len(store.layout.segments) - 1):
        directions = store.tangent(index + 1, tangents.vector).values()
        for number in range(len(recording.traces)):
            tangent = input_tangent(recording, tangents, number, index)
            graph = recording.graphs[number, f"block {index}"]
            tangents.hiddens[number].append(tangent)
            tangents.cuts[number].append(graph.push_forward([tangent, *directions]))


def input_tangent(recording: Recording, tangents: Tangents, number: int, index: int) -> Tensor:
    """The tangent of block `index`'s input, once those of all cuts before it are there."""
    expression, cuts = recording.traces[number].inputs[index], recording.traces[number].cuts[:index]
    along = tangents.cuts[number][:index]
    if cuts and expression is cuts[-1]:  # nothing between the blocks: by far the commonest case
        return along[-1]
    return push_forward(expression, [*cuts, *recording.root], [*along, *tangents.root])


def _push_dual(
    trace: Trace, index: int, weights: dict[str, Tensor], directions: dict[str, Tensor], tangent: Tensor
) -> tuple[Any, Tensor]:
    with torch.no_grad(), forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(w, directions[n]) if n in directions else w for n, w in weights.items()}
        output = trace.calls[index].run(duals, forward_ad.make_dual(trace.inputs[index].detach(), tangent))
        parts = output if isinstance(output, tuple) else (output,)
        value, direction = forward_ad.unpack_dual(parts[0])
        rest = [forward_ad.unpack_dual(part).primal if isinstance(part, Tensor) else part for part in parts[1:]]
    result = (value, *rest) if isinstance(output, tuple) else value
    return result, torch.zeros_like(value) if direction is None else direction


def _push_in_reverse(
    trace: Trace, index: int, weights: dict[str, Tensor], directions: dict[str, Tensor], tangent: Tensor
) -> tuple[Any, Tensor]:
    """As `_push_dual`, by differentiating the gradient by its cotangent: twice the cost, and no forward-mode rule."""
    named = {name: weight.detach().requires_grad_(name in directions) for name, weight in weights.items()}
    leaves = BlockWeights(named, [named[name] for name in directions])
    leaf, output = run_block(trace, index, leaves)
    direction = push_forward(first_of(output), [leaf, *leaves.trainable], [tangent, *directions.values()])
    return tree_map_only(Tensor, Tensor.detach, output), direction.detach()
