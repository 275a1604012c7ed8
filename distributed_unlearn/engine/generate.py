"""Greedy continuations with the partitioned model's own forward: weights are gathered block by block for every token.

All ranks take the same number of forward passes: a rank whose rows have ended goes on with what it has until all have.
Rows are padded on the left, so that the last position is every row's own; positions and masks come from the lengths.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.curvature.trace import LossShare
from distributed_unlearn.data.sampling import micro_batches, num_micro_batches
from distributed_unlearn.engine.inputs import NotedLogits
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.workers.survey import GreedySpec, TokenRows


def generate(opened: OpenedModel, prompts: TokenRows, spec: GreedySpec) -> TokenRows:
    """The most likely continuation of every prompt, one row each in the order of the prompts, without the prompt.

    A row ends with a stop token, at `max_new_tokens`, or where the model's context is full. All ranks must call this.
    """
    communicator, rows = opened.communicator, prompts.rows()
    order = np.argsort(prompts.lengths, kind="stable")
    count = num_micro_batches(len(order), communicator.world_size, spec.micro_batch_size)
    found: list[tuple[int, list[int]]] = []
    for chosen in micro_batches(order[communicator.rank :: communicator.world_size], spec.micro_batch_size, count):
        writer = _Writer(opened, [rows[index] for index in chosen], spec)
        while not communicator.all_true(writer.ended):
            writer.write()
        found.extend(zip(chosen.tolist(), writer.written, strict=False))
    return TokenRows.of([written for _, written in sorted(communicator.gather_parts(found))])


def _takes_cache(opened: OpenedModel) -> bool:
    """Whether the model keeps keys and values in a cache that is handed to it, and is told the positions."""
    taken = inspect.signature(opened.model.forward).parameters
    kinds = set(getattr(opened.config, "layer_types", None) or ())
    plain = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
    return plain and {"past_key_values", "position_ids", "attention_mask"} <= taken.keys()


@dataclass
class _Writer:
    """One micro-batch of rows on this rank; without rows one row that is ended from the start."""

    opened: OpenedModel
    prompts: list[list[int]]
    spec: GreedySpec
    written: list[list[int]] = field(init=False)
    _cache: DynamicCache | None = field(init=False)
    _mask: Tensor = field(init=False)
    _pending: Tensor = field(init=False)
    """int64 [B, T]: tokens that the cache does not know yet; all of them where there is none."""

    def __post_init__(self) -> None:
        rows = self.prompts or [[self.spec.pad_token]]
        assert all(rows), "a prompt without tokens: nothing predicts a first one"
        width, device = max(map(len, rows)), self.opened.communicator.device
        padded = [[self.spec.pad_token] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        self._pending = torch.tensor(padded, dtype=torch.int64, device=device)
        self._mask = torch.tensor(mask, dtype=torch.int64, device=device)
        self._cache = DynamicCache(config=self.opened.config) if _takes_cache(self.opened) else None
        self.written = [[] for _ in rows]

    @property
    def ended(self) -> bool:
        """Whether every row is."""
        return not self.prompts or all(self._has_ended(row) for row in range(len(self.prompts)))

    def _has_ended(self, row: int) -> bool:
        written = self.written[row]
        context = self.opened.family.context_length(self.opened.config)
        full = context is not None and len(self.prompts[row]) + len(written) >= context
        stopped = bool(written) and written[-1] in self.spec.stop_tokens
        return stopped or full or len(written) >= self.spec.max_new_tokens

    def write(self) -> None:
        """One more token of every row that has not ended. All ranks must call this."""
        token = self._next_tokens()
        for row, value in enumerate(token.tolist()):
            if self.prompts and not self._has_ended(row):
                self.written[row].append(value)
        self._mask = torch.cat([self._mask, torch.ones_like(token)[:, None]], dim=1)
        following = token[:, None]
        self._pending = following if self._cache is not None else torch.cat([self._pending, following], dim=1)

    def _next_tokens(self) -> Tensor:
        """[B]. All ranks must call this."""
        noted, (num_rows, width) = NotedLogits(), self._pending.shape
        last = torch.arange(1, num_rows + 1, device=self._pending.device) * width - 1
        Linearisation(self.opened.segmented, self.opened.store, [LossShare(self._inputs(), noted, last)]).loss()
        assert noted.logits is not None
        return noted.logits.argmax(-1)

    def _inputs(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": self._pending, "attention_mask": self._mask}
        if "position_ids" in inspect.signature(self.opened.model.forward).parameters:
            context = self.opened.family.context_length(self.opened.config) or 1 << 30
            positions = (self._mask.cumsum(1) - 1).clamp(0, context - 1)
            inputs["position_ids"] = positions[:, -self._pending.shape[1] :]
        if self._cache is not None:
            inputs |= {"past_key_values": self._cache, "use_cache": True}
        return inputs
