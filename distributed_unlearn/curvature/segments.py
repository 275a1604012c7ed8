"""Find the segments of a causal language model: its blocks, and the root that holds everything else.

A block is a child of the `ModuleList` that the model's `_no_split_modules` names: one decoder layer. The
root owns the parameters outside all blocks (embeddings, final norm, head). The model's own `forward` drives
root and blocks, so masks, rotary embeddings, embedding scaling and tied weights stay the model's business.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from distributed_unlearn.errors import ModelError


@dataclass(frozen=True)
class Segment:
    """Parameters that are gathered, used and released together."""

    name: str
    module: nn.Module
    """Module on which `parameter_names` are looked up: the model for the root, else the block."""
    parameter_names: tuple[str, ...]
    """Names relative to `module`, in `named_parameters` order, tied duplicates removed."""
    qualified_names: tuple[str, ...]
    """The same parameters by their names in the whole model."""
    is_root: bool


@dataclass(frozen=True)
class SegmentedModel:
    """A model with its segments; `segments[0]` is the root, the rest are blocks in forward order."""

    model: nn.Module
    segments: tuple[Segment, ...]
    fallback_reason: str | None
    """Why the whole model became one segment, or None where blocks were found."""

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The block modules in forward order; empty for a model of one segment."""
        return tuple(segment.module for segment in self.segments[1:])


def _candidate_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    no_split = set(getattr(model, "_no_split_modules", None) or ())
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(type(child).__name__ in no_split for child in module)
    ]


def _num_parameters(module: nn.Module) -> int:
    # Under ZeRO-3 a parameter's own tensor is empty and its true size is in `ds_numel`.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def find_segments(model: nn.Module) -> SegmentedModel:
    """Split `model` into root and blocks.

    Falls back to one segment, with the reason in `fallback_reason`, when no `ModuleList` of
    `_no_split_modules` is found or when blocks share parameters with each other or with the root.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    candidates = _candidate_lists(model)
    reason = None if candidates else "no ModuleList whose members are named by _no_split_modules"
    segments: list[Segment] = []
    owned: set[int] = set()
    if candidates:
        list_name, blocks = max(candidates, key=lambda item: _num_parameters(item[1]))
        for index, block in enumerate(blocks):
            members = [(name, parameter) for name, parameter in block.named_parameters()]
            if owned & {id(parameter) for _, parameter in members}:
                reason = f"blocks of {list_name} share parameters"
                break
            owned |= {id(parameter) for _, parameter in members}
            segments.append(_make_segment(f"{list_name}.{index}", block, members, names, is_root=False))
        if reason is None and _shared_with_root(model, blocks, owned):
            reason = f"blocks of {list_name} share parameters with the rest of the model"
    if reason is not None:
        segments, owned = [], set()
    root_members = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in owned]
    root = _make_segment("root", model, root_members, names, is_root=True)
    return SegmentedModel(model, (root, *segments), reason)


def _parameters_outside(module: nn.Module, blocks: set[int]) -> Iterator[nn.Parameter]:
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module.children():
        if id(child) not in blocks:
            yield from _parameters_outside(child, blocks)


def _shared_with_root(model: nn.Module, blocks: nn.ModuleList, owned: set[int]) -> bool:
    # By path and not by module: a block's norm may be the model's norm as well, one object under two names.
    return any(id(parameter) in owned for parameter in _parameters_outside(model, {id(block) for block in blocks}))


def _make_segment(
    name: str, module: nn.Module, members: list[tuple[str, nn.Parameter]], names: dict[int, str], is_root: bool
) -> Segment:
    return Segment(
        name=name,
        module=module,
        parameter_names=tuple(local for local, _ in members),
        qualified_names=tuple(names[id(parameter)] for _, parameter in members),
        is_root=is_root,
    )


def trainable_names(model: nn.Module, patterns: str | tuple[str, ...]) -> frozenset[str]:
    """Qualified names of the parameters that an update may touch: all, or those matching a shell pattern.

    Raises:
        ModelError: a pattern that matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    if isinstance(patterns, str):
        return frozenset(names)
    chosen: set[str] = set()
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ModelError(
                f"model.trainable pattern '{pattern}', which matches none of {len(names)} parameters",
                f"shell patterns on names such as '{names[0]}'",
                "correct the pattern or use `all`",
            )
        chosen.update(matches)
    return frozenset(chosen)


def frozen_rows(model: nn.Module) -> dict[str, int]:
    """`{qualified parameter name: row}` of the embedding rows at `padding_idx`, which every product freezes.

    Reverse mode treats such a row as a constant and forward mode does not (pytorch issue 93950), so a
    product that mixed the two would not be symmetric. Here the row's entries of `v`, of the gradient and of
    `H v` are zero: the operator is the Hessian with that row held fixed. With tied embeddings the row is
    frozen in its role as output weight too.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(module.weight)]: module.padding_idx
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    }
