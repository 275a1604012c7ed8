"""What objectives see: the logits of every prediction, its label, its record, and what was known of it at the start.

A *prediction* is one answer token of a causal language model, or the class of a record. Sums over a record's
predictions are taken here, so that objectives over records and objectives over tokens have one entrance.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class MinibatchTotals:
    """Counts over the *global* minibatch: all ranks, all micro-batches."""

    num_forget_records: int
    num_retain_records: int
    num_forget_tokens: int
    num_retain_tokens: int

    def __post_init__(self) -> None:
        counts = (self.num_forget_records, self.num_retain_records, self.num_forget_tokens, self.num_retain_tokens)
        assert min(counts) >= 0, f"negative count in {counts}"


@dataclass(frozen=True)
class RecordSums:
    """Some records of one micro-batch, one entry each."""

    nll: Tensor
    """[B], float32 or float64: sum over the record's predictions of `-log p`, nats; differentiable."""
    num_tokens: Tensor
    """[B], int64: predictions."""
    reference_nll: Tensor
    """[B]: `nll` under the weights at the round's start, a constant; NaN where no objective reads it."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """One micro-batch on this rank: N predictions of B records. A record without predictions is padding.

    Sums over a wide vocabulary are not done in half precision: what is computed here is float32 or wider, and has
    first and second derivatives and forward-mode ones, in every grad mode.
    """

    logits: Tensor
    """[N, V], any floating dtype."""
    labels: Tensor
    """[N], int64."""
    record: Tensor
    """[N], int64: the record each prediction belongs to, from 0 to B - 1."""
    is_forget: Tensor
    """[B], bool."""
    reference_nll: Tensor
    """[B]: see `RecordSums`."""

    def __post_init__(self) -> None:
        shapes = [tuple(x.shape) for x in (self.labels, self.record)]
        assert self.logits.dim() == 2 and shapes == [(len(self.logits),)] * 2, f"{self.logits.shape}, {shapes}"
        assert self.is_forget.dim() == 1 and self.is_forget.shape == self.reference_nll.shape
        assert self.is_forget.dtype == torch.bool, f"is_forget is {self.is_forget.dtype}, not bool"

    @cached_property
    def wide(self) -> Tensor:
        """The logits, float32 or wider."""
        return self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))

    @cached_property
    def nll(self) -> Tensor:
        """[N]: `-log softmax(logits[n])[labels[n]]`, nats; has a graph even where N is 0."""
        return functional.cross_entropy(self.wide, self.labels, reduction="none")

    @cached_property
    def hits(self) -> Tensor:
        """[N], bool: whether the arg max is the label."""
        return self.logits.detach().argmax(-1) == self.labels

    @cached_property
    def num_tokens(self) -> Tensor:
        """[B], int64: the record's predictions."""
        return self._belongs.sum(1)

    @cached_property
    def _belongs(self) -> Tensor:
        """[B, N], bool: whether prediction n is record b's."""
        return self.record == torch.arange(len(self.is_forget), device=self.record.device).unsqueeze(1)

    def per_record(self, values: Tensor) -> Tensor:
        """[N] -> [B], sums. Selected, never multiplied by zero: a NaN of one record stays there. Deterministic."""
        return torch.where(self._belongs, values, 0).sum(1)

    def records_of(self, is_forget: bool) -> RecordSums:
        """Sums of the forget (or the retain) records that have a prediction; possibly of none."""
        chosen = (self.is_forget == is_forget) & (self.num_tokens > 0)
        return RecordSums(self.per_record(self.nll)[chosen], self.num_tokens[chosen], self.reference_nll[chosen])

    def of_role(self, is_forget: bool) -> Tensor:
        """[N], bool: whether the prediction belongs to a forget (or a retain) record."""
        return self.is_forget[self.record] == is_forget
