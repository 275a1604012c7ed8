"""What the files of a checkpoint hold, from their headers: names, shapes and dtypes, and no weight."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.errors import ModelError
from distributed_unlearn.files import expand_home

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, I8."""


def stored_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint's files by its key; of a hub model only what is on this machine already.

    Returns:
        Nothing for a hub model whose files are not all here yet.

    Raises:
        ModelError: files that are missing or damaged, or an index that does not fit them.
    """
    index = _find(config, "model.safetensors.index.json")
    if index is None:
        single = _find(config, "model.safetensors")
        return {} if single is None else read_headers(single)
    weight_map = _weight_map(index, config)
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        path = _find(config, name)
        if path is None:
            if not Path(expand_home(config.path)).is_dir():
                return {}
            raise _unfit(config, f"names the file {name}, which is not there")
        held = read_headers(path)
        absent = sorted(key for key, file in weight_map.items() if file == name and key not in held)
        if absent:
            raise _unfit(config, f"names tensors that {name} does not hold ({_few(absent)})")
        found.update(held)
    return found


def float_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype | None:
    """The narrowest dtype that holds every floating-point tensor exactly; None without any."""
    found = None
    for tensor in tensors.values():
        own = FLOAT_DTYPES.get(tensor.dtype)
        if own is not None:
            found = own if found is None else torch.promote_types(found, own)
    return found


def held_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that weights are loaded in, and frozen ones kept in: bfloat16 or float16 as the files, else float32."""
    own = float_dtype(tensors)
    return own if own in (torch.bfloat16, torch.float16) else torch.float32


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        ModelError: not a safetensors file, or one that was cut off.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            slices = {key: reader.get_slice(key) for key in reader.keys()}  # noqa: SIM118
            return {key: StoredTensor(tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"weights that cannot be loaded, '{path}' ({str(error).splitlines()[0]})",
            "intact safetensors files",
            "copy or download the checkpoint again",
        ) from error


def _find(config: ModelConfig, name: str) -> Path | None:
    folder = Path(expand_home(config.path))
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        found = cached_file(config.path, name, revision=config.revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(str(found))


def _weight_map(index: Path, config: ModelConfig) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        assert isinstance(found, dict) and all(isinstance(file, str) for file in found.values())
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise _unfit(config, f"cannot be read ({type(error).__name__})") from error
    if any(Path(file).name != file for file in found.values()):
        raise _unfit(config, "names files outside the checkpoint's folder")
    return found


def _unfit(config: ModelConfig, what: str) -> ModelError:
    return ModelError(
        f"model.path '{config.path}', whose model.safetensors.index.json {what}",
        "an index that says of every tensor in which file it is",
        "copy or convert the checkpoint again",
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
