"""The model's own forward with every block cut out: what each segment saw, and the root's autograd graph.

During the trace a block's `forward` is replaced by a function that evaluates the block without a graph and
returns its output as a new leaf (a *cut*). What remains in the graph is the root: embeddings up to the first
block, whatever glue there is between blocks (usually nothing), final norm, head and loss. The trace is the
list of segments in forward order plus that root graph; `linearisation` runs it backwards.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from distributed_unlearn.curvature.gradient_graph import edge_of
from distributed_unlearn.curvature.head import rows_before_head
from distributed_unlearn.errors import ModelError

LossOfLogits = Callable[[Tensor], Tensor]
"""Logits, the chosen rows [N, V] or all that the model returns -> this rank's share of the objective, a scalar."""


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

    def run(self, weights: dict[str, Tensor], hidden: Tensor) -> Any:
        """Everything the block returns at the given weights and hidden state."""
        args = self.args if self.hidden_name else (hidden, *self.args)
        kwargs = {**self.kwargs, self.hidden_name: hidden} if self.hidden_name else self.kwargs
        with _forward_replaced(self.block, None):
            named = {f"block.{name}": weight for name, weight in weights.items()}
            return functional_call(_ForwardOnly(self.block), named, args, kwargs)


@dataclass
class Trace:
    """One micro-batch: root leaves, and per block its call, input expression and cut."""

    root_leaves: dict[str, Tensor]
    """Root weights; trainable ones require grad."""
    calls: list[BlockCall] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    """Block inputs as expressions in root leaves and earlier cuts (graph attached)."""
    cuts: list[Tensor] = field(default_factory=list)
    """Block outputs as leaves."""
    logits: Tensor | None = None
    loss: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Every tensor that the trace holds."""
        calls = [(call.args, call.kwargs) for call in self.calls]
        held = tree_leaves((self.root_leaves, calls, self.inputs, self.cuts, self.logits, self.loss))
        return [item for item in held if isinstance(item, Tensor)]


BlockEvaluator = Callable[[int, BlockCall, Tensor], Any]
"""(block index, call, hidden expression) -> everything the block returns, without a graph."""


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
    return tensor.detach().requires_grad_(torch.is_grad_enabled() and differentiable)


def _refuse_other_paths(trace: Trace) -> None:
    """Walk the root's graph: its only leaves may be root weights and cuts.

    Through any other (a block's second output, a block's weight that the root uses by itself) the loss depends
    on the weights in a way that the sweep back cannot see.
    """
    known = {id(leaf) for leaf in (*trace.root_leaves.values(), *trace.cuts)}
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


def trace_forward(
    trace: Trace,
    model: nn.Module,
    blocks: tuple[nn.Module, ...],
    inputs: dict[str, Any],
    loss_of_logits: LossOfLogits,
    evaluate_block: BlockEvaluator,
    positions: Tensor | None = None,
) -> None:
    """Run the model's forward once with all blocks cut, and fill `trace` on the way.

    Only the logits of `positions` are computed where these are given (see `rows_before_head`).

    The root graph is kept; the blocks leave values only. A block's further outputs (attention weights) become
    leaves that nothing may differentiate by: they may be returned, but not used on the way to the logits. All
    ranks must call this where `evaluate_block` gathers.

    Raises:
        ModelError: a model that does not call every block once, in order, with one hidden state; or, under grad
            mode, one whose logits depend on a block's weights in another way than by its first output.
    """

    def replacement(block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, hidden = _split_call(block, args, kwargs)
            index = len(trace.calls)
            trace.calls.append(call)
            trace.inputs.append(hidden)
            output = evaluate_block(index, call, hidden)
            first, rest = (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)
            cut = _as_leaf(first)
            trace.cuts.append(cut)
            return cut if rest is None else (cut, *tree_map_only(Tensor, _as_leaf, rest))

        return forward

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_forward_replaced(block, replacement(block)))
        selection = stack.enter_context(rows_before_head(model, positions))
        output = functional_call(model, trace.root_leaves, (), inputs, tie_weights=True)
        trace.logits = selection.rows(output.logits)
        trace.loss = loss_of_logits(trace.logits)
    if [id(call.block) for call in trace.calls] != [id(block) for block in blocks]:
        raise ModelError(
            f"{len(trace.calls)} block calls for {len(blocks)} blocks, or another order",
            "a model that calls each block exactly once, in order",
            "run this model as one segment (zero_stage 0 to 2)",
        )
    _refuse_other_paths(trace)
