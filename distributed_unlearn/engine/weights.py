"""The weights of one rank as flat shards: an fp32 master, what the forward pass gathers from, and frozen ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from distributed_unlearn.curvature.layout import FlatLayout, SegmentLayout, Slot, shard_of, unpack
from distributed_unlearn.engine.communicator import Communicator


class ShardedWeights:
    """The weights of one rank: an fp32 master shard of what is trainable, and what the forward pass gathers.

    Args:
        model: as `load_model` returned it.
        layout: the flat layout of its parameters for this world size.
        communicator: the group.
        compute_dtype: dtype of gathered weights; float64 is for checks.
        partitioned: True at ZeRO stage 3.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: FlatLayout,
        communicator: Communicator,
        compute_dtype: torch.dtype,
        partitioned: bool,
    ) -> None:
        self._layout, self._communicator = layout, communicator
        self._dtype, self._partitioned = compute_dtype, partitioned
        # `Any`: DeepSpeed adds ds_tensor and the like to parameters.
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self._master_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
        self.master = self._collect(True, layout.vector_numel, self._master_dtype)
        """This rank's trainable weights: [vector_numel], fp32 (float64 in checks), padding zero."""
        self._compute = self.master if compute_dtype == self._master_dtype else self.master.to(compute_dtype)
        # Frozen weights are kept once, as they were loaded: in partitions or, below stage 3, in the model itself.
        self._frozen: Tensor | None = None
        if partitioned:
            self._frozen = self._collect(False, layout.frozen_numel, self._frozen_dtype())
            self._adopt_partitions(self._frozen)

    def _slots(self, trainable: bool) -> Iterator[tuple[int, Slot]]:
        for segment in self._layout.segments:
            start = segment.start if trainable else segment.frozen_start
            for slot in segment.trainable if trainable else segment.frozen:
                yield start + slot.offset, slot

    def _frozen_dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every frozen weight exactly."""
        held = [self._parameters[slot.qualified_name].ds_tensor.dtype for _, slot in self._slots(trainable=False)]
        return reduce(torch.promote_types, held, held[0]) if held else torch.bfloat16

    def _collect(self, trainable: bool, size: int, dtype: torch.dtype) -> Tensor:
        flat = torch.zeros(size, dtype=dtype, device=self._communicator.device)
        for begin, slot in self._slots(trainable):
            parameter = self._parameters[slot.qualified_name]
            if self._partitioned:
                count = slot.local_numel(self._communicator.rank)
                assert parameter.ds_tensor.numel() == slot.shard_numel, "DeepSpeed partitions differently"
                flat[begin : begin + count] = parameter.ds_tensor[:count].to(dtype)  # its padding is not initialised
            else:
                flat[begin : begin + slot.shard_numel] = shard_of(
                    parameter.detach(), slot, self._communicator.rank, dtype
                )
        return flat

    def _adopt_partitions(self, frozen: Tensor) -> None:
        for flat, trainable in ((self._compute, True), (frozen, False)):
            for begin, slot in self._slots(trainable):
                self._parameters[slot.qualified_name].ds_tensor.data = flat[begin : begin + slot.shard_numel]

    def segment_weights(self, segment: SegmentLayout) -> dict[str, Tensor]:
        """Full weights of a segment in the compute dtype. All ranks must call this."""
        if not self._partitioned:
            return self._replicated((*segment.trainable, *segment.frozen), self._dtype)
        trainable = self._gather(segment.trainable, self._compute[segment.start : segment.stop], self._dtype)
        return {**trainable, **self._frozen_weights(segment, self._dtype)}

    def master_segment_weights(self, segment: SegmentLayout) -> dict[str, Tensor]:
        """Full weights of a segment at the master's precision. All ranks must call this."""
        trainable = self._gather(segment.trainable, self.master[segment.start : segment.stop], self._master_dtype)
        return {**trainable, **self._frozen_weights(segment, self._master_dtype)}

    def segment_weights_at(self, segment: SegmentLayout, shard: Tensor) -> dict[str, Tensor]:
        """Full weights of a segment in the compute dtype, were `shard` the trainable ones; on any device.

        All ranks must call this.
        """
        local = shard[segment.start : segment.stop].to(self._communicator.device)
        trainable = self._gather(segment.trainable, local, self._dtype)
        return {**trainable, **self._frozen_weights(segment, self._dtype)}

    def _replicated(self, slots: Sequence[Slot], dtype: torch.dtype) -> dict[str, Tensor]:
        return {slot.name: self._parameters[slot.qualified_name].detach().to(dtype) for slot in slots}

    def _frozen_weights(self, segment: SegmentLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        if self._frozen is None:
            return self._replicated(segment.frozen, dtype)
        return self._gather(segment.frozen, self._frozen[segment.frozen_start : segment.frozen_stop], dtype)

    def _gather(self, slots: Sequence[Slot], local: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        if not slots:
            return {}
        narrow = local.to(dtype) if dtype.itemsize < local.dtype.itemsize else local  # the fewer bytes travel
        return unpack(self._communicator.all_gather(narrow).to(dtype), slots, self._layout.world_size)

    def set_master(self, master: Tensor) -> None:
        """Overwrite the weights by a vector in the master's layout. All ranks must call this."""
        self.master.copy_(master)
        self.refresh()

    def refresh(self) -> None:
        """Bring what the forward pass uses up to the master. All ranks must call this."""
        if self._compute is not self.master:
            self._compute.copy_(self.master)
        if self._partitioned:
            return
        for segment in self._layout.segments:
            if segment.trainable:
                gathered = self._communicator.all_gather(self._compute[segment.start : segment.stop])
                for slot in segment.trainable:
                    full = unpack(gathered, (slot,), self._layout.world_size)[slot.name]
                    self._parameters[slot.qualified_name].data.copy_(full)

    def gather_parameter(self, segment: SegmentLayout, slot: Slot, vector: Tensor | None = None) -> Tensor:
        """One full parameter at the master's precision. All ranks must call this.

        Args:
            segment: where `slot` is.
            slot: the parameter.
            vector: take a trainable one from here instead of the master, in its layout: [vector_numel] on any device.
        """
        if slot.trainable:
            source, begin = self.master if vector is None else vector, segment.start + slot.offset
        elif self._frozen is not None:
            source, begin = self._frozen, segment.frozen_start + slot.offset
        else:
            return self._parameters[slot.qualified_name].detach().to(self._master_dtype)
        local = source[begin : begin + slot.shard_numel].to(self._communicator.device)
        gathered = self._communicator.all_gather(local).to(self._master_dtype)
        return gathered[: slot.numel].view(slot.shape)


@dataclass(frozen=True)
class MasterWeights:
    """The weights at the master's precision, as a `WeightSource`."""

    weights: ShardedWeights

    def segment_weights(self, segment: SegmentLayout) -> dict[str, Tensor]:
        """Full parameters by name within the segment. All ranks must call this."""
        return self.weights.master_segment_weights(segment)


class FormerWeights:
    """The weights as they were when this was made, in the compute dtype and on the host, as a `WeightSource`."""

    def __init__(self, weights: ShardedWeights, dtype: torch.dtype) -> None:
        self._weights, self._trainable = weights, weights.master.detach().to("cpu", dtype, copy=True)

    def segment_weights(self, segment: SegmentLayout) -> dict[str, Tensor]:
        """Full parameters by name within the segment. All ranks must call this."""
        return self._weights.segment_weights_at(segment, self._trainable)
