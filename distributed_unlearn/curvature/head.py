"""Choose the positions whose logits anybody reads before the output embedding, not after it.

Answers are short and vocabularies wide: of logits [B, T, V] a loss reads N rows, and every vocabulary-wide
temporary of a forward pass, a gradient or a product is [N, V] where the rows are chosen first. The model's own
forward stays in charge: only the output embedding's input is cut, so whatever a model does to its logits afterwards
(scaling, soft-capping, a cast) is done as it wants, on fewer rows, and tied weights stay tied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from distributed_unlearn.errors import ModelError


class RowSelection:
    """One forward pass's choice of rows, and what became of it.

    Args:
        model: its `get_output_embeddings()` is cut; where it has none the rows are chosen from finished logits.
        positions: int64 [N], unique, into the flattened [B * T] positions; None: the logits as the model returns
            them, e.g. a classifier's [B, V].
    """

    def __init__(self, model: nn.Module, positions: Tensor | None) -> None:
        self._positions = positions
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if positions is not None and get_head is not None else None
        self._head = head if isinstance(head, nn.Module) else None
        self._num_calls = 0

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Context in which this forward pass may reach the output embedding, and no other one does."""
        if self._head is None:
            yield
            return
        # Before the model's own hooks: those of partitioned training gather by module, whatever it is called with.
        handle = self._head.register_forward_pre_hook(self._cut)
        try:
            yield
        finally:
            handle.remove()

    def _cut(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the output embedding: hidden states [B, T, D] -> the chosen ones [1, N, D]."""
        del head
        assert self._positions is not None
        self._num_calls += 1
        hidden = args[0]
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._positions)
        return (rows.unsqueeze(0), *args[1:])

    def rows(self, logits: Tensor) -> Tensor:
        """The chosen logits [N, V], of what the model returned; all of them where nothing is to be chosen.

        Raises:
            ModelError: a model that does to its logits what cannot be done row by row.
        """
        if self._positions is None:
            return logits
        if self._num_calls == 0:
            return logits.reshape(-1, logits.shape[-1]).index_select(0, self._positions)
        if self._num_calls > 1 or logits.shape[:-1] != (1, len(self._positions)):
            raise ModelError(
                f"logits of shape {tuple(logits.shape)} after {self._num_calls} calls of the output embedding on "
                f"{len(self._positions)} chosen positions",
                "a model that applies its output embedding once and treats every position alike",
                "use a causal language model of a supported family",
            )
        return logits[0]


@contextmanager
def rows_before_head(model: nn.Module, positions: Tensor | None) -> Iterator[RowSelection]:
    """Context for one forward pass of `model`, of which only some rows of logits are wanted.

    Args:
        model: see `RowSelection`.
        positions: likewise.

    Yields:
        The selection; `rows` turns the model's logits into those that are wanted. The same numbers either way, but
        for the order in which matrix products add up.
    """
    selection = RowSelection(model, positions)
    with selection.in_force():
        yield selection
