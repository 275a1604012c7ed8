"""Write a complete Hugging Face checkpoint from shards, one parameter in memory at a time.

All ranks plan the same files from names and shapes alone, then gather parameter after parameter (or the few that
become one tensor of the files); file `i` is collected and written by rank `i mod world_size`. So no rank holds more
than one file and one parameter. With
ranks on several nodes the folder must be on storage that all of them share.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distributed_unlearn.config import ModelConfig, SaveConfig
from distributed_unlearn.curvature.layout import SegmentLayout, Slot
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.models.adapters import AdapterFiles, MergedCheckpoint
from distributed_unlearn.models.processor import tokenizer_source
from distributed_unlearn.models.saved_names import SavedForm, SavedGroup, WholeCheckpoint
from distributed_unlearn.records import SurvivingUpdate


def _plan_files(form: SavedForm, dtype: torch.dtype, max_bytes: int) -> list[list[SavedGroup]]:
    files: list[list[SavedGroup]] = [[]]
    size = 0
    for group in form.groups:
        needed = group.numel * dtype.itemsize
        if files[-1] and size + needed > max_bytes:
            files.append([])
            size = 0
        files[-1].append(group)
        size += needed
    return files


def _file_name(stem: str, index: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def _places(opened: OpenedModel) -> dict[str, tuple[SegmentLayout, Slot]]:
    return {
        slot.qualified_name: (segment, slot)
        for segment in opened.layout.segments
        for slot in (*segment.trainable, *segment.frozen)
    }


def write_weights(opened: OpenedModel, form: SavedForm, folder: Path, dtype: torch.dtype, max_bytes: int) -> None:
    """Write the weights as safetensors files of at most `max_bytes`, with an index where there are several.

    Parameters that are converted together go into one file. All ranks must call this.
    """
    communicator, places = opened.communicator, _places(opened)
    files = _plan_files(form, dtype, max_bytes)
    keys: dict[str, str] = {}
    for index, members in enumerate(files):
        mine: dict[str, Tensor] = {}
        name = _file_name(form.stem, index, len(files))
        for group in members:
            full = {member: opened.weights.gather_parameter(*places[member]) for member in group.members}
            keys.update(dict.fromkeys(group.shapes, name))
            if index % communicator.world_size == communicator.rank:
                tensors = form.tensors(full).items()
                mine.update({key: value.to(dtype, copy=True).cpu().contiguous() for key, value in tensors})
        if index == 0:
            buffers = form.buffers()
            keys.update(dict.fromkeys(buffers, name))
            if communicator.rank == 0:
                mine.update({key: value.detach().cpu().contiguous() for key, value in buffers.items()})
        if mine:
            save_file(mine, folder / name, metadata={"format": "pt"})
    communicator.barrier()
    if communicator.rank == 0 and len(files) > 1:
        total = sum(group.numel * dtype.itemsize for group in form.groups)
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": keys}, indent=2)
        (folder / f"{form.stem}.safetensors.index.json").write_text(index_text + "\n", encoding="utf-8")
    communicator.barrier()


def measure_surviving_update(
    opened: OpenedModel, form: SavedForm, folder: Path, dtype: torch.dtype, max_bytes: int, initial: Tensor
) -> SurvivingUpdate:
    """Read the files back and compare with the weights at the start. All ranks must call this.

    The comparison is made on the tensors of the files, each by the rank that wrote it.

    Args:
        opened: the model as it was written.
        form: as given to `write_weights`.
        folder: where `write_weights` wrote it.
        dtype: the saved dtype.
        max_bytes: as given to `write_weights`.
        initial: this rank's master shard at the start [vector_numel].
    """
    communicator, places = opened.communicator, _places(opened)
    files, sums = _plan_files(form, dtype, max_bytes), torch.zeros(5, dtype=torch.float64)
    for index, groups in enumerate(files):
        path = folder / _file_name(form.stem, index, len(files))
        for group in groups:
            members = {member: places[member] for member in group.members}
            if not any(slot.trainable for _, slot in members.values()):
                continue
            before, now = (
                {name: opened.weights.gather_parameter(*place, vector) for name, place in members.items()}
                for vector in (initial, None)
            )
            if index % communicator.world_size == communicator.rank:
                sums += _compare(path, form.tensors(before), form.tensors(now))
    total = [float(value) for value in communicator.all_reduce_sum(sums)]
    return SurvivingUpdate(
        update_norm=total[0] ** 0.5,
        saved_update_norm=total[1] ** 0.5,
        projection=total[2] / total[0] if total[0] > 0 else 1.0,
        share_of_changed_weights=total[3] / max(total[4], 1.0),
        dtype=str(dtype).removeprefix("torch."),
    )


def _compare(path: Path, before: dict[str, Tensor], now: dict[str, Tensor]) -> Tensor:
    """`||Delta||^2`, `||saved - before||^2`, their inner product, changed entries, entries: [5], float64."""
    sums = torch.zeros(5, dtype=torch.float64)
    with safe_open(path, framework="pt") as reader:
        for key, value in before.items():
            start = value.double().cpu()
            update = (now[key].double().cpu() - start).reshape(-1)
            kept = (reader.get_tensor(key).double() - start).reshape(-1)
            changed = torch.count_nonzero(kept).double()
            entries = torch.tensor(float(kept.numel()), dtype=torch.float64)
            sums += torch.stack([update @ update, kept @ kept, kept @ update, changed, entries])
    return sums


def export_model(
    opened: OpenedModel, folder: Path, base: ModelConfig, save: SaveConfig, initial: Tensor
) -> SurvivingUpdate:
    """Write weights, configuration and the base's tokenizer into `folder`, read back and compare.

    All ranks must call this.

    Args:
        opened: the model.
        folder: exists and is empty; every rank sees it.
        base: the checkpoint that was opened.
        save: dtype and size of the files.
        initial: this rank's master shard at the start [vector_numel].
    """
    form, own_dtype = _form(opened, save)
    dtype = own_dtype if save.dtype is None else getattr(torch, save.dtype)
    max_bytes = int(save.max_shard_gib * 2**30)
    folders = {folder: dtype}
    if save.fp32_master and dtype != torch.float32:
        folders[folder / "fp32_master"] = torch.float32
    for target, precision in folders.items():
        target.mkdir(exist_ok=True)
        write_weights(opened, form, target, precision, max_bytes)
        write_configuration(opened, form, target, precision)
        write_tokenizer(opened, base, target)
    return measure_surviving_update(opened, form, folder, dtype, max_bytes, initial)


def _form(opened: OpenedModel, save: SaveConfig) -> tuple[SavedForm, torch.dtype]:
    """What is written, and the dtype that it has by itself."""
    shapes = {name: slot.shape for name, (_, slot) in _places(opened).items()}
    if opened.adapter is None:
        return WholeCheckpoint(opened.model, shapes), opened.checkpoint_dtype
    if save.adapter == "merged":
        return MergedCheckpoint(opened.model, opened.adapter, shapes), opened.checkpoint_dtype
    return AdapterFiles(opened.adapter, shapes), torch.float32


def write_tokenizer(opened: OpenedModel, base: ModelConfig, folder: Path) -> None:
    """Rank 0 copies the base checkpoint's tokenizer or image processor. All ranks must call this."""
    if opened.communicator.rank == 0:
        source = tokenizer_source(base)
        opened.family.save_processor(source.path, source.revision, folder)
    opened.communicator.barrier()


def write_configuration(opened: OpenedModel, form: SavedForm, folder: Path, dtype: torch.dtype) -> None:
    """Rank 0 writes config.json and generation_config.json, or adapter_config.json. All ranks must call this."""
    if opened.communicator.rank == 0 and isinstance(form, AdapterFiles):
        form.write_settings(folder)
    elif opened.communicator.rank == 0:
        config = opened.config
        previous, config.dtype = getattr(config, "dtype", None), dtype
        config.save_pretrained(folder)
        config.dtype = previous
        generation = getattr(opened.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    opened.communicator.barrier()
