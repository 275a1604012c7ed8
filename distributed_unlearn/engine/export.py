"""Write a complete Hugging Face checkpoint from shards, one parameter in memory at a time.

All ranks plan the same files from the layout alone, then gather parameter after parameter; file `i` is
collected and written by rank `i mod world_size`. So no rank holds more than one file and one parameter. With
ranks on several nodes the folder must be on storage that all of them share.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from distributed_unlearn.curvature.layout import SegmentLayout, Slot, shard_of
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.records import SurvivingUpdate


def _slots(opened: OpenedModel) -> Iterator[tuple[SegmentLayout, Slot]]:
    for segment in opened.layout.segments:
        for slot in (*segment.trainable, *segment.frozen):
            yield segment, slot


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _plan_files(opened: OpenedModel, dtype: torch.dtype, max_bytes: int) -> list[list[tuple[SegmentLayout, Slot]]]:
    files: list[list[tuple[SegmentLayout, Slot]]] = [[]]
    size = 0
    for segment, slot in _slots(opened):
        needed = slot.numel * dtype.itemsize
        if files[-1] and size + needed > max_bytes:
            files.append([])
            size = 0
        files[-1].append((segment, slot))
        size += needed
    return files


def _file_name(stem: str, index: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def write_weights(opened: OpenedModel, folder: Path, dtype: torch.dtype, max_bytes: int, stem: str = "model") -> None:
    """Write the weights as safetensors files of at most `max_bytes`, with an index where there are several.

    All ranks must call this.
    """
    communicator = opened.communicator
    files = _plan_files(opened, dtype, max_bytes)
    places: dict[str, str] = {}
    for index, members in enumerate(files):
        mine: dict[str, Tensor] = {}
        name = _file_name(stem, index, len(files))
        for segment, slot in members:
            full = opened.weights.gather_master(segment, slot)
            places[slot.qualified_name] = name
            if index % communicator.world_size == communicator.rank:
                mine[slot.qualified_name] = full.to(dtype, copy=True).cpu().contiguous()
        if index == 0:
            buffers = _persistent_buffers(opened.model)
            places.update(dict.fromkeys(buffers, name))
            if communicator.rank == 0:
                mine.update({key: value.detach().cpu().contiguous() for key, value in buffers.items()})
        if mine:
            save_file(mine, folder / name, metadata={"format": "pt"})
    communicator.barrier()
    if communicator.rank == 0 and len(files) > 1:
        total = sum(slot.numel * dtype.itemsize for _, slot in _slots(opened))
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
        (folder / f"{stem}.safetensors.index.json").write_text(index_text + "\n", encoding="utf-8")
    communicator.barrier()


def measure_surviving_update(
    opened: OpenedModel, folder: Path, dtype: torch.dtype, max_bytes: int, initial: Tensor
) -> SurvivingUpdate:
    """Read the files back and compare with the weights at the start. All ranks must call this.

    Args:
        opened: the model as it was written.
        folder: where `write_weights` wrote it.
        dtype: the saved dtype.
        max_bytes: as given to `write_weights`.
        initial: this rank's master shard at the start [vector_numel].
    """
    communicator, files = opened.communicator, _plan_files(opened, dtype, max_bytes)
    sums = torch.zeros(4, dtype=torch.float64)
    for index, members in enumerate(files):
        with safe_open(folder / _file_name("model", index, len(files)), framework="pt") as reader:
            for segment, slot in members:
                if not slot.trainable:
                    continue
                saved = shard_of(reader.get_tensor(slot.qualified_name), slot, communicator.rank, torch.float64)
                begin = segment.start + slot.offset
                before = initial[begin : begin + slot.shard_numel].double().cpu()
                update = opened.weights.master[begin : begin + slot.shard_numel].double().cpu() - before
                kept = saved - before
                parts = [update @ update, kept @ kept, kept @ update, torch.count_nonzero(kept).double()]
                sums += torch.stack(parts)
    total = [float(value) for value in communicator.all_reduce_sum(sums)]
    return SurvivingUpdate(
        update_norm=total[0] ** 0.5,
        saved_update_norm=total[1] ** 0.5,
        projection=total[2] / total[0] if total[0] > 0 else 1.0,
        share_of_changed_weights=total[3] / max(opened.layout.num_trainable, 1),
        dtype=str(dtype).removeprefix("torch."),
    )


def write_tokenizer(opened: OpenedModel, base: str, revision: str | None, folder: Path) -> None:
    """Rank 0 copies the base checkpoint's tokenizer. All ranks must call this."""
    if opened.communicator.rank == 0:
        AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=False).save_pretrained(folder)
    opened.communicator.barrier()


def write_configuration(opened: OpenedModel, folder: Path, dtype: torch.dtype) -> None:
    """Rank 0 writes config.json and generation_config.json."""
    if opened.communicator.rank == 0:
        config = opened.config
        previous, config.dtype = getattr(config, "dtype", None), dtype
        config.save_pretrained(folder)
        config.dtype = previous
        generation = getattr(opened.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    opened.communicator.barrier()
