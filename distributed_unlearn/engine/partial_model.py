"""A model up to one of its blocks: for objectives on hidden states."""

from dataclasses import replace

from distributed_unlearn.curvature.layout import FlatLayout
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.engine.model import OpenedModel


def up_to_block(opened: OpenedModel, last: int) -> OpenedModel:
    """The same partitions and vectors, but a forward that ends with block `last`'s output in the place of logits.

    Neither later blocks nor the output embedding are gathered or computed, except that the root, which holds the
    embeddings too, is gathered whole. Vectors have their full size; entries of later blocks are never written.
    """
    count = last + 2  # the root comes first
    assert 0 <= last and count <= len(opened.segmented.segments), "no such block"
    layout = FlatLayout(opened.layout.segments[:count], opened.layout.world_size)

    def shortened(store: SegmentStore) -> SegmentStore:
        return replace(store, layout=layout)

    store = shortened(opened.store)
    return replace(
        opened,
        segmented=replace(opened.segmented, segments=opened.segmented.segments[:count], ends_at_last_block=True),
        layout=layout,
        store=store,
        master_store=store if opened.master_store is opened.store else shortened(opened.master_store),
    )
