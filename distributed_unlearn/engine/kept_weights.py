"""A second model's weights beside the opened one, for comparisons on the same micro-batch: shards on the host.

Both models have one layout, so the opened model's own forward runs on either; what is gathered at a time is a segment.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distributed_unlearn.curvature.layout import FlatLayout, SegmentLayout
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.errors import ModelError


class KeptWeights:
    """The trainable weights and the buffers of a model that was open when this was made."""

    def __init__(self, opened: OpenedModel) -> None:
        dtype = opened.store.compute_dtype
        self._layout = opened.layout
        self._shard = opened.weights.master.detach().to("cpu", dtype, copy=True)
        self._buffers = {name: buffer.detach().to("cpu", copy=True) for name, buffer in opened.model.named_buffers()}

    @contextmanager
    def in_place_of(self, opened: OpenedModel) -> Iterator[SegmentStore]:
        """A store of these weights for `opened`'s forward, whose buffers are these for the length of the block.

        Raises:
            ModelError: a model of another layout.
        """
        if _shapes(self._layout) != _shapes(opened.layout):
            raise ModelError(
                "a retrained reference whose weights have other names or shapes",
                "two models of one architecture, either both with an adapter or both without",
                "compare models of one kind, or merge the adapter into its base",
            )
        store = SegmentStore(
            opened.layout, opened.communicator, _OneShard(opened, self._shard), opened.store.compute_dtype
        )
        own = {name: buffer.detach().clone() for name, buffer in opened.model.named_buffers()}
        try:
            _set_buffers(opened, self._buffers)
            yield store
        finally:
            _set_buffers(opened, own)


class _OneShard:
    """A `WeightSource` of another shard in the opened model's layout."""

    def __init__(self, opened: OpenedModel, shard: Tensor) -> None:
        self._weights, self._shard = opened.weights, shard

    def segment_weights(self, segment: SegmentLayout) -> dict[str, Tensor]:
        """Full parameters by name within the segment. All ranks must call this."""
        return self._weights.segment_weights_at(segment, self._shard)


def _shapes(layout: FlatLayout) -> list[tuple[str, tuple[int, ...], bool]]:
    slots = [slot for part in layout.segments for slot in (*part.trainable, *part.frozen)]
    return [(slot.qualified_name, tuple(slot.shape), slot.trainable) for slot in slots]


def _set_buffers(opened: OpenedModel, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in opened.model.named_buffers():
            if name in values and values[name].shape == buffer.shape:
                buffer.copy_(values[name])
