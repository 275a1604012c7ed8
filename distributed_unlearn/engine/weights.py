"""The weights of one rank as flat shards: an fp32 master, what the forward pass gathers from, and frozen ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
        master_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
        self.master = self._collect(trainable=True, dtype=master_dtype)
        """This rank's trainable weights: [vector_numel], fp32 (float64 in checks), padding zero."""
        self._compute = self.master if compute_dtype == master_dtype else self.master.to(compute_dtype)
        self._frozen = self._collect(trainable=False, dtype=compute_dtype)
        # As loaded, on the host: what an update does not touch must leave as it came.
        self._exact_frozen = (
            self._frozen if compute_dtype == master_dtype else self._collect(trainable=False, dtype=master_dtype).cpu()
        )
        if partitioned:
            self._adopt_partitions()

    def _slots(self, trainable: bool) -> Iterator[tuple[int, Slot]]:
        for segment in self._layout.segments:
            start = segment.start if trainable else segment.frozen_start
            for slot in segment.trainable if trainable else segment.frozen:
                yield start + slot.offset, slot

    def _collect(self, trainable: bool, dtype: torch.dtype) -> torch.Tensor:
        size = self._layout.vector_numel if trainable else self._layout.frozen_numel
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

    def _adopt_partitions(self) -> None:
        for flat, trainable in ((self._compute, True), (self._frozen, False)):
            for begin, slot in self._slots(trainable):
                self._parameters[slot.qualified_name].ds_tensor.data = flat[begin : begin + slot.shard_numel]

    def segment_weights(self, segment: SegmentLayout) -> dict[str, torch.Tensor]:
        """Full weights of a segment in the compute dtype. All ranks must call this."""
        if not self._partitioned:
            return {
                slot.name: self._parameters[slot.qualified_name].detach().to(self._dtype)
                for slot in (*segment.trainable, *segment.frozen)
            }
        return self._gather(segment, self._compute, self._frozen)

    def exact_segment_weights(self, segment: SegmentLayout) -> dict[str, torch.Tensor]:
        """Full weights of a segment at the master's precision. All ranks must call this."""
        return self._gather(segment, self.master, self._exact_frozen)

    def _gather(self, segment: SegmentLayout, trainable: torch.Tensor, frozen: torch.Tensor) -> dict[str, torch.Tensor]:
        full: dict[str, torch.Tensor] = {}
        for flat, slots, start, stop in (
            (trainable, segment.trainable, segment.start, segment.stop),
            (frozen, segment.frozen, segment.frozen_start, segment.frozen_stop),
        ):
            if slots:
                local = flat[start:stop].to(self._communicator.device)
                full.update(unpack(self._communicator.all_gather(local), slots, self._layout.world_size))
        return full

    def set_master(self, master: torch.Tensor) -> None:
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

    def gather_master(self, segment: SegmentLayout, slot: Slot) -> torch.Tensor:
        """One full parameter at the master's precision. All ranks must call this."""
        flat, start = (self.master, segment.start) if slot.trainable else (self._exact_frozen, segment.frozen_start)
        begin = start + slot.offset
        local = flat[begin : begin + slot.shard_numel].to(self._communicator.device)
        gathered = self._communicator.all_gather(local)
        return gathered[: slot.numel].view(slot.shape)


@dataclass(frozen=True)
class ExactWeights:
    """The weights at the master's precision, as a `WeightSource`."""

    weights: ShardedWeights

    def segment_weights(self, segment: SegmentLayout) -> dict[str, torch.Tensor]:
        """Full parameters by name within the segment. All ranks must call this."""
        return self.weights.exact_segment_weights(segment)
