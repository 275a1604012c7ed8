"""How a parameter vector lies in memory: one flat tensor a rank, segment by segment, parameter by parameter.

Every parameter is cut into `world_size` equal parts of `ceil(numel / world_size)` entries, exactly as
DeepSpeed's ZeRO-3 cuts it; the last part is padded and its padding is always zero. A rank's part of a vector
is the concatenation of its parts of all trainable parameters. A segment is therefore one contiguous slice,
gathered by one collective, and applying an update to the weights touches local memory only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from distributed_unlearn.curvature.segments import SegmentedModel


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the flat vector of its kind (trainable or frozen)."""

    name: str
    """Name relative to the segment's module."""
    qualified_name: str
    shape: tuple[int, ...]
    numel: int
    shard_numel: int
    offset: int
    """First entry of this rank's part, counted from the start of the segment."""
    trainable: bool
    frozen_row: int | None

    def local_numel(self, rank: int) -> int:
        """Entries of `rank`'s part that are parameters rather than padding."""
        return min(max(self.numel - rank * self.shard_numel, 0), self.shard_numel)


@dataclass(frozen=True)
class SegmentLayout:
    """The slots of a segment and its slices of the trainable and the frozen flat vector."""

    name: str
    trainable: tuple[Slot, ...]
    frozen: tuple[Slot, ...]
    start: int
    stop: int
    frozen_start: int
    frozen_stop: int


@dataclass(frozen=True)
class FlatLayout:
    """The layout of all segments for one world size."""

    segments: tuple[SegmentLayout, ...]
    world_size: int

    @property
    def vector_numel(self) -> int:
        """Entries of one rank's part of a parameter vector, padding included."""
        return self.segments[-1].stop

    @property
    def frozen_numel(self) -> int:
        """Entries of one rank's part of the parameters that are never updated."""
        return self.segments[-1].frozen_stop

    @property
    def num_trainable(self) -> int:
        """Trainable parameters of the whole model, padding excluded."""
        return sum(slot.numel for segment in self.segments for slot in segment.trainable)


def build_layout(
    segmented: SegmentedModel,
    shapes: Mapping[str, tuple[int, ...]],
    trainable: frozenset[str],
    frozen_rows: Mapping[str, int],
    world_size: int,
) -> FlatLayout:
    """Lay out every parameter; `shapes` are the full shapes by qualified name."""
    layouts: list[SegmentLayout] = []
    start = frozen_start = 0
    for segment in segmented.segments:
        slots: dict[bool, list[Slot]] = {True: [], False: []}
        offsets = {True: 0, False: 0}
        for name, qualified in zip(segment.parameter_names, segment.qualified_names, strict=True):
            is_trainable = qualified in trainable
            numel = prod(shapes[qualified])
            shard = -(-numel // world_size)
            row = frozen_rows.get(qualified)
            slot = Slot(name, qualified, shapes[qualified], numel, shard, offsets[is_trainable], is_trainable, row)
            slots[is_trainable].append(slot)
            offsets[is_trainable] += shard
        stop, frozen_stop = start + offsets[True], frozen_start + offsets[False]
        layouts.append(
            SegmentLayout(segment.name, tuple(slots[True]), tuple(slots[False]), start, stop, frozen_start, frozen_stop)
        )
        start, frozen_start = stop, frozen_stop
    return FlatLayout(tuple(layouts), world_size)


def shard_of(full: torch.Tensor, slot: Slot, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """`rank`'s part of a full parameter, padded with zeros: [shard_numel]."""
    part = torch.zeros(slot.shard_numel, dtype=dtype, device=full.device)
    count = slot.local_numel(rank)
    begin = rank * slot.shard_numel
    part[:count] = full.reshape(-1)[begin : begin + count].to(dtype)
    return part


def unpack(gathered: torch.Tensor, slots: Sequence[Slot], world_size: int) -> dict[str, torch.Tensor]:
    """Full parameters from a gathered segment slice [world_size * slice]; views where world_size is 1."""
    rows = gathered.view(world_size, -1)
    return {
        slot.name: rows[:, slot.offset : slot.offset + slot.shard_numel].reshape(-1)[: slot.numel].view(slot.shape)
        for slot in slots
    }


def empty_rows(slots: Sequence[Slot], world_size: int, like: torch.Tensor) -> torch.Tensor:
    """Zeros for a whole segment, row `r` being what rank `r` owns: [world_size, slice] in `like`'s dtype and device."""
    width = sum(slot.shard_numel for slot in slots)
    return torch.zeros(world_size, width, dtype=like.dtype, device=like.device)


def add_to_rows(rows: torch.Tensor, slot: Slot, full: torch.Tensor) -> None:
    """Add a full parameter-shaped tensor at its place in `rows` [world_size, slice], in `rows`' dtype."""
    columns = rows[:, slot.offset : slot.offset + slot.shard_numel]
    flat = full.reshape(-1)
    num_whole = slot.numel // slot.shard_numel
    num_covered = num_whole * slot.shard_numel
    columns[:num_whole] += flat[:num_covered].view(num_whole, -1)
    if num_covered < slot.numel:
        columns[num_whole, : slot.numel - num_covered] += flat[num_covered:]


def zero_frozen_rows(rows: torch.Tensor, slots: Sequence[Slot]) -> None:
    """Zero what belongs to rows frozen by `padding_idx`, in `rows` [world_size, slice]."""
    for slot in slots:
        if slot.frozen_row is None:
            continue
        length = slot.numel // slot.shape[0]
        begin, end = slot.frozen_row * length, (slot.frozen_row + 1) * length
        for rank in range(begin // slot.shard_numel, -(-end // slot.shard_numel)):
            first, last = max(begin - rank * slot.shard_numel, 0), min(end - rank * slot.shard_numel, slot.shard_numel)
            rows[rank, slot.offset + first : slot.offset + last] = 0
