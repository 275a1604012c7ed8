"""A model opened on this rank: segments, layout, weights, store and vector space, built together once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.curvature.layout import FlatLayout, build_layout
from distributed_unlearn.curvature.segments import SegmentedModel, find_segments, frozen_rows
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.engine.communicator import Communicator
from distributed_unlearn.engine.partitions import build_buffers_exactly, checkpoint_dtype, full_shapes, load_model
from distributed_unlearn.engine.vectors import ShardedSpace
from distributed_unlearn.engine.weights import MasterWeights, ShardedWeights
from distributed_unlearn.errors import NumericalError
from distributed_unlearn.models.adapters import InsertedAdapter
from distributed_unlearn.models.base_of_adapter import opened_as
from distributed_unlearn.models.families import family_of
from distributed_unlearn.models.family import ModelFamily, batch_norms, refuse_half_statistics
from distributed_unlearn.models.fit import refuse_one_segment
from distributed_unlearn.models.stored import held_dtype, stored_tensors
from distributed_unlearn.models.trainable import trainable_parameters
from distributed_unlearn.workers.messages import ModelFacts


@dataclass(frozen=True)
class OpenedModel:
    """One rank's model: every object below refers to the same partitions."""

    model: nn.Module
    segmented: SegmentedModel
    layout: FlatLayout
    weights: ShardedWeights
    store: SegmentStore
    master_store: SegmentStore
    """As `store`, at the master's precision: for losses whose differences are smaller than the compute dtype shows."""
    space: ShardedSpace
    communicator: Communicator
    checkpoint_dtype: torch.dtype
    family: ModelFamily
    adapter: InsertedAdapter | None

    @property
    def config(self) -> Any:
        """The Hugging Face model configuration."""
        return self.model.config

    def facts(self) -> ModelFacts:
        """A summary without tensors."""
        sizes = [slot.numel for part in self.layout.segments for slot in (*part.trainable, *part.frozen)]
        return ModelFacts(
            num_parameters=sum(sizes),
            num_trainable=self.layout.num_trainable,
            num_segments=len(self.layout.segments),
            segment_fallback=self.segmented.fallback_reason,
            context_length=self.family.context_length(self.config),
            vocab_size=self.family.vocab_size(self.config),
            checkpoint_dtype=str(self.checkpoint_dtype).removeprefix("torch."),
            num_batch_norms=len(batch_norms(self.model)),
        )


def open_model(config: ModelConfig, dtype: torch.dtype, zero_stage: int, communicator: Communicator) -> OpenedModel:
    """Load a checkpoint into partitions and adopt it. All ranks must call this.

    Raises:
        ModelError: not loadable, or blocks that cannot be found at stage 3.
        NumericalError: weights that are not finite.
    """
    # In the dtype of the files: the fp32 master must start from their values, and what is frozen keeps them.
    config = opened_as(config)
    # A hub model's files may be on some nodes only, and the ranks must agree.
    own = held_dtype(stored_tensors(config))
    agreed = [dtype for dtype in (torch.bfloat16, torch.float16) if communicator.all_true(own == dtype)]
    stored = agreed[0] if agreed else torch.float32
    model, adapter = load_model(config, stored, zero_stage, communicator.device)
    if stored != torch.float32:
        build_buffers_exactly(model, config)
    own_dtype = checkpoint_dtype(config)
    family = family_of(config.task)
    return adopt_model(model, family, adapter, config.trainable, dtype, own_dtype, zero_stage, communicator)


def adopt_model(
    model: nn.Module,
    family: ModelFamily,
    adapter: InsertedAdapter | None,
    trainable: str | tuple[str, ...],
    dtype: torch.dtype,
    own_dtype: torch.dtype,
    zero_stage: int,
    communicator: Communicator,
) -> OpenedModel:
    """Segment, lay out and check a model that is in memory, partitioned or not. All ranks must call this.

    Raises:
        ModelError: blocks that cannot be found at stage 3, or batch normalisation in bfloat16.
        NumericalError: weights that are not finite.
    """
    refuse_half_statistics(model, dtype)
    segmented = find_segments(model, family.blocks(model), family.constants)
    refuse_one_segment(segmented.fallback_reason, zero_stage)
    layout = build_layout(
        segmented,
        full_shapes(model),
        trainable_parameters(model, family, trainable, adapter),
        frozen_rows(model),
        communicator.world_size,
    )
    weights = ShardedWeights(model, layout, communicator, dtype, zero_stage == 3)
    _cast(model, layout, dtype, zero_stage == 3)
    if not communicator.all_true(bool(torch.isfinite(weights.master).all())):
        raise NumericalError("weights with NaN or infinite entries", "finite weights", "use an intact checkpoint")
    store = SegmentStore(layout, communicator, weights, dtype)
    exact = weights.master.dtype
    return OpenedModel(
        model=model,
        segmented=segmented,
        layout=layout,
        weights=weights,
        store=store,
        master_store=store if dtype == exact else SegmentStore(layout, communicator, MasterWeights(weights), exact),
        space=ShardedSpace(layout, communicator),
        communicator=communicator,
        checkpoint_dtype=own_dtype,
        family=family,
        adapter=adapter,
    )


def _cast(model: nn.Module, layout: FlatLayout, dtype: torch.dtype, partitioned: bool) -> None:
    """Bring what `ShardedWeights` does not own to the compute dtype: replicated weights, placeholders, buffers.

    Replicated weights that are frozen stay as they were loaded. A partitioned parameter's empty placeholder only has
    to have the right dtype for code that asks `module.weight.dtype`. Buffers such as rotary frequencies stay float32
    in bfloat16 models, as transformers keeps them.
    """
    frozen = {slot.qualified_name for segment in layout.segments for slot in segment.frozen}
    for name, parameter in model.named_parameters():
        if partitioned or name not in frozen:
            parameter.data = parameter.data.to(dtype)
    if dtype == torch.float64:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.double()
