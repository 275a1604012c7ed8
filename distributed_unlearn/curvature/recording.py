"""What a forward pass over some micro-batches leaves for the sweep back, and for later products."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distributed_unlearn.curvature.gradient_graph import GradientGraph
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.curvature.trace import Trace


@dataclass
class Tangents:
    """The direction of a product."""

    vector: Tensor
    """Sharded."""
    root: list[Tensor]
    """Its slice of the root's trainable weights, full size."""
    hiddens: list[list[Tensor]]
    """By micro-batch, then block: tangents of block inputs."""
    cuts: list[list[Tensor]]
    """By micro-batch, then block: tangents of block outputs."""

    @classmethod
    def along(cls, store: SegmentStore, vector: Tensor, num_micro_batches: int) -> "Tangents":
        """Gather the root's slice; no block has been reached. All ranks must call this."""
        root = list(store.tangent(0, vector).values())
        return cls(vector, root, [[] for _ in range(num_micro_batches)], [[] for _ in range(num_micro_batches)])


@dataclass
class BlockWeights:
    """A block's gathered weights, the same tensors for every micro-batch."""

    named: dict[str, Tensor]
    """Trainable ones are leaves that require grad."""
    trainable: list[Tensor]
    """In the order of the flat vector."""


@dataclass
class Recording:
    """A pass over some micro-batches at fixed weights.

    Between two segments of a pass each micro-batch holds, for every block that the sweep back has not reached, the
    block's input (with its tangent where there is a direction) and what else the block was called with (masks and
    the like, usually the same for all blocks). Logits and their derivatives exist for one micro-batch at a time.
    `weights`, `outputs` and the blocks' graphs stay empty unless the pass keeps them.
    """

    root_leaves: dict[str, Tensor]
    root: list[Tensor]
    """The trainable ones of `root_leaves`, in the order of the flat vector."""
    traces: list[Trace]
    weights: dict[int, BlockWeights] = field(default_factory=dict)
    """By block."""
    outputs: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By (micro-batch, block): the block's input as a leaf, and its output with its graph."""
    graphs: dict[tuple[int, str], GradientGraph] = field(default_factory=dict)
    """By (micro-batch, part of the model)."""

    @classmethod
    def start(cls, store: SegmentStore, num_micro_batches: int) -> "Recording":
        """Gather the root. All ranks must call this."""
        names = set(store.trainable(0)) if torch.is_grad_enabled() else set()
        leaves = {name: weight.detach().requires_grad_(name in names) for name, weight in store.weights(0).items()}
        return cls(leaves, [leaves[name] for name in store.trainable(0)], [Trace() for _ in range(num_micro_batches)])

    def loss(self) -> Tensor:
        """The micro-batches' losses, added in their order: a float64 scalar without a graph."""
        losses = [trace.loss.detach().double() for trace in self.traces if trace.loss is not None]
        assert len(losses) == len(self.traces), "a pass that has not come to its end"
        return sum(losses[1:], start=losses[0])


def gather_block(store: SegmentStore, index: int) -> BlockWeights:
    """Block `index`'s weights as leaves. All ranks must call this."""
    names = store.trainable(index + 1)
    named = {n: w.detach().requires_grad_(n in names) for n, w in store.weights(index + 1).items()}
    return BlockWeights(named, [named[name] for name in names])


def run_block(trace: Trace, index: int, weights: BlockWeights) -> tuple[Tensor, Any]:
    """One block's graph: its input as a leaf, and everything that it returns."""
    leaf = trace.inputs[index].detach().requires_grad_()
    with torch.enable_grad():
        return leaf, trace.calls[index].run(weights.named, leaf)


def first_of(output: Any) -> Tensor:
    """The hidden state among what a block returns."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
