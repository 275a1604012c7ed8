"""What a job will need, from the model's configuration alone: memory a rank, products and communication.

The model is built on the meta device with accelerate, so no weight is read or allocated. Communication is
exact (a test compares it with what a run moves); memory is an estimate of the largest terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.curvature.layout import FlatLayout, Slot, build_layout
from distributed_unlearn.curvature.segments import find_segments, frozen_rows
from distributed_unlearn.models.adapters import insert_adapter
from distributed_unlearn.models.base_of_adapter import opened_as
from distributed_unlearn.models.families import family_of
from distributed_unlearn.models.family import ModelFamily, batch_norms
from distributed_unlearn.models.fit import empty_model, refuse_one_segment
from distributed_unlearn.models.trainable import trainable_parameters


@dataclass(frozen=True)
class SegmentSize:
    """Parameters of one segment."""

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        """Both."""
        return self.trainable + self.frozen


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model and its segments, in parameters."""

    num_parameters: int
    num_trainable: int
    root: SegmentSize
    largest_block: SegmentSize
    num_blocks: int
    fallback_reason: str | None
    layout: FlatLayout
    family: ModelFamily
    num_batch_norms: int
    frozen_dtype: torch.dtype
    """Of the weights that no update touches: the files' own where it is bfloat16 or float16, else float32."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: int
    """What the forward pass gathers from, the fp32 master beside it where they differ."""
    vectors: int
    """Gradient, Krylov basis, work vectors and undo copy (or optimiser moments), fp32, partitioned."""
    host_copies: int
    """Weights at the start of the job and of the round, fp32, partitioned, in CPU memory."""
    gathered: int
    """Weights, tangent, gradient and product of the root and of one block, unpartitioned."""
    activations: int
    """Block inputs with tangents of all micro-batches of a pass, logits and one block's graph for one micro-batch."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.vectors + self.host_copies + self.gathered + self.activations


@dataclass(frozen=True)
class TrainingMemoryEstimate:
    """Bytes on one rank while it trains under DeepSpeed with AdamW (Rajbhandari et al. 2020, section 3)."""

    weights: int
    gradients: int
    optimizer_states: int
    """Two fp32 moments and, but at stage 0 in float32, an fp32 copy of the weights."""
    activations: int
    """All blocks' graphs and the logits for one micro-batch."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer_states + self.activations


def measure_model(
    config: ModelConfig, hf_config: Any, world_size: int, zero_stage: int, frozen_dtype: torch.dtype = torch.float32
) -> ModelSize:
    """Build the architecture without weights, with its adapter, and lay it out.

    Args:
        config: what is trainable, and the adapter.
        hf_config: its Hugging Face configuration.
        world_size: number of ranks.
        zero_stage: 0 to 3.
        frozen_dtype: dtype that frozen weights are loaded in.

    Raises:
        ModelError: no blocks at stage 3, or a trainable pattern or target module that matches nothing.
    """
    family = family_of(config.task)
    model = empty_model(family, hf_config)
    inserted = insert_adapter(model, opened_as(config))
    segmented = find_segments(model, family.blocks(model), family.constants)
    refuse_one_segment(segmented.fallback_reason, zero_stage)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    trainable = trainable_parameters(model, family, config.trainable, inserted)
    layout = build_layout(segmented, shapes, trainable, frozen_rows(model), world_size)
    sizes = [SegmentSize(_numel(part.trainable), _numel(part.frozen)) for part in layout.segments]
    return ModelSize(
        num_parameters=sum(size.total for size in sizes),
        num_trainable=layout.num_trainable,
        root=sizes[0],
        largest_block=max(sizes[1:], key=lambda size: size.total, default=SegmentSize(0, 0)),
        num_blocks=len(sizes) - 1,
        fallback_reason=segmented.fallback_reason,
        layout=layout,
        family=family,
        num_batch_norms=len(batch_norms(model)),
        frozen_dtype=frozen_dtype,
    )


def _numel(slots: Sequence[Slot]) -> int:
    return sum(slot.numel for slot in slots)


def estimate_memory(
    size: ModelSize,
    hf_config: Any,
    dtype: torch.dtype,
    zero_stage: int,
    num_vectors: int,
    micro_batch_size: int,
    record_size: int,
    held_inputs: int,
) -> MemoryEstimate:
    """Largest terms of one rank's memory; `num_vectors` are the solver's parameter vectors.

    `record_size`: of the largest record: tokens, or pixels a side.
    `held_inputs`: of how many micro-batches a pass holds the block inputs at once, tangents counted as inputs.
    """
    item, shard = dtype.itemsize, size.layout.vector_numel * 4
    shares = size.layout.world_size if zero_stage == 3 else 1
    num_frozen = size.num_parameters - size.num_trainable
    weights = size.num_trainable // shares * item + num_frozen // shares * size.frozen_dtype.itemsize
    if not (zero_stage == 3 and dtype == torch.float32):
        weights += shard
    sizes = size.family.activation_sizes(hf_config, micro_batch_size, record_size)
    layers = max(size.num_blocks, 1)
    # A product holds a block's gradient graph and its tangents beside its graph, about three times that.
    blocks = held_inputs * layers * sizes.block_input + 3 * sizes.block_graph
    # Of what is frozen there is a weight, of what is trainable a tangent, a gradient and a product too.
    gathered = [4 * segment.trainable + segment.frozen for segment in (size.root, size.largest_block)]
    return MemoryEstimate(
        weights=weights,
        vectors=num_vectors * shard,
        host_copies=2 * shard,
        gathered=item * sum(gathered),
        activations=item * blocks + 4 * 4 * sizes.logits,
    )


def estimate_training_memory(
    size: ModelSize, hf_config: Any, dtype: torch.dtype, zero_stage: int, micro_batch_size: int, record_size: int
) -> TrainingMemoryEstimate:
    """Largest terms of one rank's memory in a training job; `zero_stage` is the training's own."""
    world, item = size.layout.world_size, dtype.itemsize
    sizes = size.family.activation_sizes(hf_config, micro_batch_size, record_size)
    states = (8 if zero_stage == 0 and dtype == torch.float32 else 12) * size.num_trainable
    return TrainingMemoryEstimate(
        weights=item * (size.num_parameters // world if zero_stage == 3 else size.num_parameters),
        gradients=item * (size.num_trainable // world if zero_stage >= 2 else size.num_trainable),
        optimizer_states=states // world if zero_stage >= 1 else states,
        activations=item * max(size.num_blocks, 1) * sizes.block_graph + 3 * 4 * sizes.logits,
    )


def elements_per_product(size: ModelSize, zero_stage: int, cached: bool) -> int:
    """Elements that collectives deliver to a rank for one product without gradient, all micro-batches."""
    return _elements(size, zero_stage, weight_gathers=0 if cached else 2, root_weights=not cached, products=True)


def elements_per_gradient(size: ModelSize, zero_stage: int, keep_forward: bool) -> int:
    """Elements that collectives deliver to a rank for one gradient, all micro-batches."""
    return _elements(size, zero_stage, weight_gathers=1 if keep_forward else 2, root_weights=True, products=False)


def elements_per_loss(size: ModelSize, zero_stage: int, exact: bool = False) -> int:
    """Elements that collectives deliver to a rank for one loss alone, all micro-batches; weights are gathered once.

    With `exact` at the precision of a master that is another one than the weights': trainable weights then come from
    the master's partitions at every stage.
    """
    frozen = size.layout.frozen_numel if zero_stage == 3 else 0
    trainable = size.layout.vector_numel if zero_stage == 3 or exact else 0
    return size.layout.world_size * (trainable + frozen)


def elements_per_refresh(size: ModelSize, zero_stage: int) -> int:
    """Elements that collectives deliver to a rank when an update is applied or undone: to replicated weights alone."""
    return 0 if zero_stage == 3 else size.layout.world_size * size.layout.vector_numel


def _elements(size: ModelSize, zero_stage: int, weight_gathers: int, root_weights: bool, products: bool) -> int:
    layout = size.layout
    total = 0
    for index, part in enumerate(layout.segments):
        trainable = (part.stop - part.start) * layout.world_size
        frozen = (part.frozen_stop - part.frozen_start) * layout.world_size
        weights = int(root_weights) if index == 0 else weight_gathers
        tangents = 0 if not products else (1 if index == 0 else 2)
        total += tangents * trainable + trainable  # the last term scatters the result
        if zero_stage == 3:
            total += weights * (trainable + frozen)
    return total
