"""Find the segments of a model: its blocks, and the root that holds everything else.

A block is a module that the model's forward calls once, with one hidden state: a decoder layer, a stage of a
residual network. The root owns the parameters outside all blocks (embeddings, final norm, head). The model's own
`forward` drives root and blocks, so masks, rotary embeddings, embedding scaling and tied weights stay the model's
business.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from distributed_unlearn.errors import ModelError


@dataclass(frozen=True)
class Blocks:
    """The modules to cut out, by their names in the model and in forward order; or why there are none."""

    members: tuple[tuple[str, nn.Module], ...]
    absence: str | None = None
    """Why `members` is empty; None where it is not."""


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
    constants: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of every forward call beside a batch's own."""
    ends_at_last_block: bool = False
    """A forward is over with the last block's output, which takes the place of logits; what would follow is not run."""

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


def no_split_blocks(model: nn.Module) -> Blocks:
    """The largest `ModuleList` whose members `_no_split_modules` names: a transformer's layers."""
    candidates = _candidate_lists(model)
    if not candidates:
        return Blocks((), "no ModuleList whose members are named by _no_split_modules")
    name, layers = max(candidates, key=lambda item: _num_parameters(item[1]))
    return Blocks(tuple((f"{name}.{index}", layer) for index, layer in enumerate(layers)))


def find_segments(
    model: nn.Module, blocks: Blocks | None = None, constants: dict[str, Any] | None = None
) -> SegmentedModel:
    """Split `model` into root and blocks.

    Falls back to one segment, with the reason in `fallback_reason`, when there are no blocks or when they share
    parameters with each other or with the root.

    Args:
        model: any module.
        blocks: what to cut out; None: `no_split_blocks`.
        constants: keyword arguments of every forward call; None: those of a language model, without a cache.
    """
    blocks = no_split_blocks(model) if blocks is None else blocks
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    reason = blocks.absence
    segments: list[Segment] = []
    owned: set[int] = set()
    for name, block in blocks.members:
        members = [(local, parameter) for local, parameter in block.named_parameters()]
        if owned & {id(parameter) for _, parameter in members}:
            reason = f"blocks that share parameters: {name} and one before it"
            break
        owned |= {id(parameter) for _, parameter in members}
        segments.append(_make_segment(name, block, members, names, is_root=False))
    if reason is None and _shared_with_root(model, blocks, owned):
        reason = f"blocks that share parameters with the rest of the model, from {blocks.members[0][0]} on"
    if reason is not None:
        segments, owned = [], set()
    root_members = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in owned]
    root = _make_segment("root", model, root_members, names, is_root=True)
    return SegmentedModel(model, (root, *segments), reason, {"use_cache": False} if constants is None else constants)


def _parameters_outside(module: nn.Module, blocks: set[int]) -> Iterator[nn.Parameter]:
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module.children():
        if id(child) not in blocks:
            yield from _parameters_outside(child, blocks)


def _shared_with_root(model: nn.Module, blocks: Blocks, owned: set[int]) -> bool:
    # By path and not by module: a block's norm may be the model's norm as well, one object under two names.
    inside = {id(block) for _, block in blocks.members}
    return any(id(parameter) in owned for parameter in _parameters_outside(model, inside))


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


def trainable_names(
    model: nn.Module, patterns: str | tuple[str, ...], among: frozenset[str] | None = None
) -> frozenset[str]:
    """Qualified names of the parameters that an update may touch: all, or those matching a shell pattern.

    `among` are the only ones to choose from (an adapter's); None: all of the model.

    Raises:
        ModelError: a pattern that matches no parameter.
    """
    names = [name for name, _ in model.named_parameters() if among is None or name in among]
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
