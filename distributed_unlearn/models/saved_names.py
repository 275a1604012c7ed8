"""From a model's parameters to the tensors of a checkpoint's files, under the names that the source used.

transformers renames and regroups tensors on loading (GPT-NeoX's `embed_out`, the experts of a mixture stacked into one
parameter) and remembers how. Saving goes the reverse way, one group of parameters at a time: those that become the
same tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightTransform, apply_converters, revert_weight_conversion


@dataclass(frozen=True)
class SavedGroup:
    """Parameters that are converted together, and what they become in the files."""

    members: tuple[str, ...]
    """Qualified names in the model."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor by its key in the files."""

    @property
    def numel(self) -> int:
        """Entries of all tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


class SavedForm(Protocol):
    """What is written of a model: which parameters become which tensors of the files."""

    @property
    def stem(self) -> str:
        """Name of the files without ending and number."""
        ...

    @property
    def groups(self) -> tuple[SavedGroup, ...]:
        """What is converted together, in the order of the files."""
        ...

    def tensors(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A group's tensors by key, from its members' full values; views where nothing is computed."""
        ...

    def buffers(self) -> dict[str, Tensor]:
        """What is written beside the parameters, by key."""
        ...


def forget_unused_conversions(model: Any) -> None:
    """Keep of the conversions that transformers noted while loading those that the files made use of.

    At ZeRO stage 3 it notes all that it knows, and their reverse would rename what was never renamed.
    """
    noted: list[WeightTransform] = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [conversion for conversion in noted if conversion.was_used()]


def saved_groups(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[SavedGroup, ...]:
    """Every parameter of `shapes` in one group, in their order.

    Args:
        model: as it was loaded, after `forget_unused_conversions`.
        shapes: full shape of every parameter to be saved, by qualified name.
    """
    reverse = [conversion.reverse_transform() for conversion in model._weight_conversions[::-1]]
    converters = [conversion for conversion in reverse if isinstance(conversion, WeightConverter)]
    members: dict[str, list[str]] = {}
    for name in shapes:
        target, pattern = apply_converters(name, converters)
        members.setdefault(name if pattern is None else f"{target} ({pattern})", []).append(name)
    groups = []
    for names in members.values():
        empty = {name: torch.empty(shapes[name], device="meta") for name in names}
        found = {key: tuple(value.shape) for key, value in revert_weight_conversion(model, empty).items()}
        groups.append(SavedGroup(tuple(names), found))
    return tuple(groups)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong into a checkpoint, by qualified name."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


class WholeCheckpoint:
    """All parameters of a model, as its source had them."""

    stem = "model"

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        self.groups = saved_groups(model, shapes)

    def tensors(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `SavedForm`."""
        found: dict[str, Tensor] = revert_weight_conversion(self._model, dict(values))  # type: ignore[arg-type]
        return found

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers."""
        return self.tensors(persistent_buffers(self._model))
