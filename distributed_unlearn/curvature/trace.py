"""The model's own forward with every block cut out: what each segment saw, and the root's autograd graph.

During the trace a block's `forward` is replaced by a function that hands the call over and waits for the block's
output, which it returns as a new leaf (a *cut*). What remains in the graph is the root: embeddings up to the first
block, whatever glue there is between blocks (usually nothing), final norm, head and loss.

The forwards of all micro-batches stand side by side, each in a greenlet (a stack of its own in this thread, run by
nobody but us): all of them wait at block `k`, the block is evaluated for all while its weights are gathered, and all
go on to block `k + 1`. So a pass gathers a segment once, however many micro-batches it has. The head is not shared in
this way: each micro-batch runs from the last block to its loss by itself, so that logits and their derivatives are
in memory for one micro-batch at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, is_grad_enabled, nn
from torch.autograd.graph import Node
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from distributed_unlearn.curvature.gradient_graph import edge_of
from distributed_unlearn.curvature.head import RowSelection
from distributed_unlearn.curvature.segments import SegmentedModel
from distributed_unlearn.errors import ModelError

LossOfLogits = Callable[[Tensor], Tensor]
"""Logits, the chosen rows [N, V] or all that the model returns -> this rank's share of the objective, a scalar."""


@dataclass(frozen=True)
class LossShare:
    """One micro-batch on this rank."""

    inputs: Mapping[str, Any]
    """Keyword arguments of the model's forward, e.g. input_ids [B, T] and attention_mask [B, T]."""
    loss: LossOfLogits
    """Shares of all ranks and micro-batches add up to the objective."""
    positions: Tensor | None = None
    """int64 [N] into [B * T]: the loss is given the logits [N, V] of these alone, and no others are computed; None:
    it is given all that the model returns."""

    def in_dtype(self, dtype: torch.dtype) -> "LossShare":
        """With inputs that are real numbers (images) in the dtype of the weights that they meet."""
        real = {
            name: value.to(dtype)
            for name, value in self.inputs.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return replace(self, inputs={**self.inputs, **real}) if real else self


class _ForwardOnly(nn.Module):
    """A block without its hooks: the model's own call runs them, around the cut, and must not run them twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block.forward(*args, **kwargs)


@dataclass(frozen=True)
class BlockCall:
    """One call of a block as the model made it, with everything but the hidden state and the weights bound."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None
    """Keyword of the hidden state, or None where it was the first positional argument."""

    def tensors(self) -> list[Tensor]:
        """Every tensor that is bound."""
        return [item for item in tree_leaves((self.args, self.kwargs)) if isinstance(item, Tensor)]

    def run(self, weights: dict[str, Tensor], hidden: Tensor) -> Any:
        """Everything the block returns at the given weights and hidden state."""
        args = self.args if self.hidden_name else (hidden, *self.args)
        kwargs = {**self.kwargs, self.hidden_name: hidden} if self.hidden_name else self.kwargs
        with _forward_replaced(self.block, None):
            named = {f"block.{name}": weight for name, weight in weights.items()}
            return functional_call(_ForwardOnly(self.block), named, args, kwargs)


@dataclass
class Trace:
    """One micro-batch: per block its call, input expression and cut; then logits and loss."""

    calls: list[BlockCall] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    """Block inputs as expressions in root leaves and earlier cuts (graph attached)."""
    cuts: list[Tensor] = field(default_factory=list)
    """Block outputs as leaves."""
    logits: Tensor | None = None
    loss: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Every tensor that the trace holds."""
        results = [result for result in (self.logits, self.loss) if result is not None]
        return [*(tensor for call in self.calls for tensor in call.tensors()), *self.inputs, *self.cuts, *results]

    def forget_last_block(self) -> None:
        """Drop what is known of the last block that is still there, once nothing needs it."""
        for kept in (self.calls, self.inputs, self.cuts):
            kept.pop()

    def forget_blocks(self) -> None:
        """Drop what is known of all blocks, where no sweep back will ask for it."""
        for kept in (self.calls, self.inputs, self.cuts):
            kept.clear()


@contextmanager
def _forward_replaced(block: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Set or (None) lift the instance's own `forward`; restored on exit."""
    absent = object()
    previous = block.__dict__.get("forward", absent)
    if forward is None:
        block.__dict__.pop("forward", None)
    else:
        block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if previous is absent:
            block.__dict__.pop("forward", None)
        else:
            block.__dict__["forward"] = previous


def _several_paths(got: str) -> ModelError:
    return ModelError(
        got,
        "blocks through which the loss depends on the weights by one hidden state, their first input and output",
        "run this model as one segment (zero_stage 0 to 2)",
    )


def _as_leaf(tensor: Tensor) -> Tensor:
    """A block's output as a leaf; under grad mode one that shows where it is used."""
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    return tensor.detach().requires_grad_(is_grad_enabled() and differentiable)


def _refuse_other_paths(trace: Trace, root_leaves: Mapping[str, Tensor]) -> None:
    """Walk the root's graph: its only leaves may be root weights and cuts.

    Through any other (a block's second output, a block's weight that the root uses by itself) the loss depends
    on the weights in a way that the sweep back cannot see.
    """
    known = {id(leaf) for leaf in (*root_leaves.values(), *trace.cuts)}
    edges = [edge_of(expression) for expression in (*trace.inputs, trace.logits)]
    waiting: list[Node | None] = [edge.node for edge in edges if edge is not None]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in known:  # type: ignore[attr-defined]
            raise _several_paths("a model that uses a second output or a weight of a block outside the blocks")


def _split_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BlockCall, Tensor]:
    if args:
        call, hidden = BlockCall(block, args[1:], kwargs, None), args[0]
    else:
        rest = dict(kwargs)
        hidden = rest.pop("hidden_states", None)
        call = BlockCall(block, (), rest, "hidden_states")
    if not isinstance(hidden, Tensor):
        raise ModelError(
            f"a block of type {type(block).__name__} called without a hidden state",
            "the hidden state as first argument or as hidden_states",
            "run this model as one segment (zero_stage 0 to 2)",
        )
    others = tree_leaves((call.args, call.kwargs))
    if any(isinstance(other, Tensor) and other.requires_grad for other in others):
        raise _several_paths(f"a block of type {type(block).__name__} with several inputs that depend on the weights")
    return call, hidden


class _SuspendedForward(greenlet):
    """One micro-batch's forward, from block to block."""

    def __init__(self, segmented: SegmentedModel, share: LossShare, trace: Trace) -> None:
        super().__init__()
        self._model, self._blocks = segmented.model, segmented.blocks
        self._inputs = {**segmented.constants, **share.inputs}
        self._loss, self._trace = share.loss, trace
        self._ends_at_last_block = segmented.ends_at_last_block
        self._selection = RowSelection(segmented.model, share.positions)
        self._num_calls = 0
        # transformers keeps state of a running forward in context variables: each has its own.
        self.gr_context = copy_context()

    def run(self) -> None:
        """The whole forward; `at_block` suspends it."""
        output = self._model(**self._inputs)
        if self._num_calls != len(self._blocks):
            raise self._other_order()
        self._finish(output.logits)

    def _finish(self, logits: Tensor) -> None:
        self._trace.logits = self._selection.rows(logits)
        self._trace.loss = self._loss(self._trace.logits)

    def at_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the call of a block, and wait for its output."""
        call, hidden = _split_call(block, args, kwargs)
        if self._num_calls == len(self._blocks) or block is not self._blocks[self._num_calls]:
            raise self._other_order()
        self._num_calls += 1
        self._trace.calls.append(call)
        self._trace.inputs.append(hidden)
        parent = self.parent
        assert parent is not None
        output = parent.switch()
        first, rest = (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)
        cut = _as_leaf(first)
        self._trace.cuts.append(cut)
        if self._ends_at_last_block and self._num_calls == len(self._blocks):
            self._finish(cut)
            raise GreenletExit  # ends this forward and nothing else
        return cut if rest is None else (cut, *tree_map_only(Tensor, _as_leaf, rest))

    def _other_order(self) -> ModelError:
        return ModelError(
            f"{self._num_calls} block calls for {len(self._blocks)} blocks, or another order",
            "a model that calls each block exactly once, in order",
            "run this model as one segment (zero_stage 0 to 2)",
        )

    def go_on(self, *output: Any) -> bool:
        """Run to the next block, with the last one's output (nothing at the start); whether the loss is reached."""
        with self._selection.in_force():
            self.switch(*output)
        return bool(self.dead)


class _SideBySide(nn.Module):
    """A module whose forward drives several forwards of `model`, all on the weights that it was called with."""

    def __init__(self, model: nn.Module, drive: Callable[[], None]) -> None:
        super().__init__()
        self.model = model
        self._drive = drive

    def forward(self) -> None:
        self._drive()


def trace_forward(
    traces: Sequence[Trace],
    shares: Sequence[LossShare],
    segmented: SegmentedModel,
    root_leaves: dict[str, Tensor],
    evaluate_block: Callable[[int], Sequence[Any]],
    finished: Callable[[int], None],
) -> None:
    """Run the model's forward once for every micro-batch with all blocks cut, and fill the traces on the way.

    The root graph is kept; the blocks leave values only. A block's further outputs (attention weights) become
    leaves that nothing may differentiate by: they may be returned, but not used on the way to the logits. All
    ranks must call this where `evaluate_block` gathers.

    Args:
        traces: one empty trace for each micro-batch.
        shares: the micro-batches.
        segmented: the model and its blocks.
        root_leaves: the weights outside the blocks by name, which the model has meanwhile; trainable ones require
            grad.
        evaluate_block: block index -> everything the block returns, without a graph, for each micro-batch; their
            calls and inputs are the last ones of the traces.
        finished: called with the number of a micro-batch as soon as its trace is complete.

    Raises:
        ModelError: a model that does not call every block once, in order, with one hidden state; or, under grad
            mode, one whose logits depend on a block's weights in another way than by its first output.
    """

    def drive() -> None:
        forwards = [_SuspendedForward(segmented, share, trace) for share, trace in zip(shares, traces, strict=True)]
        try:
            for number, forward in enumerate(forwards):
                advance(number, forward)
            for index in range(len(segmented.blocks)):
                outputs = list(evaluate_block(index))
                for number, forward in enumerate(forwards):
                    advance(number, forward, outputs[number])
                    outputs[number] = None
        finally:
            for forward in forwards:
                if not forward.dead:  # one still waits where another failed
                    forward.throw()

    def advance(number: int, forward: _SuspendedForward, *output: Any) -> None:
        if forward.go_on(*output):
            _refuse_other_paths(traces[number], root_leaves)
            finished(number)

    with ExitStack() as stack:
        for block in segmented.blocks:
            stack.enter_context(_forward_replaced(block, _waiting_forward(block)))
        named = {f"model.{name}": weight for name, weight in root_leaves.items()}
        functional_call(_SideBySide(segmented.model, drive), named, (), tie_weights=True)


def _waiting_forward(block: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: cast(_SuspendedForward, getcurrent()).at_block(block, args, kwargs)
