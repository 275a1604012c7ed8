"""What objectives see: the logits of every prediction, its label, its record, and what was known of it at the start.

A *prediction* is one answer token of a causal language model, or the class of a record. Sums over a record's
predictions are taken here, so that objectives over records and objectives over tokens have one entrance.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

LOG_ODDS_LIMIT = 1e4
"""Where log-odds are clamped: far beyond what finite logits reach, so only a label without any alternative (all other
logits minus infinity) or an impossible one is held there, with a derivative of zero."""
_EXCLUDED = -1e30
"""The logit that stands in for the label's own when its alternatives are summed; finite, so that a row without any
alternative has derivatives that are zero and not NaN."""


def without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """`logits` [N, V] with the label's at `-1e30`, which is nothing beside any other in a softmax."""
    return logits.scatter(1, labels.unsqueeze(1), _EXCLUDED)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """`s = log p_y - log(1 - p_y) = z_y - log sum over v != y of exp z_v`, clamped to `+-LOG_ODDS_LIMIT`.

    Nothing cancels: where `p` rounds to 1 (in bfloat16 from `1 - p < 4e-3` on) `s` goes on growing as the logits'
    difference does, and so does its derivative, which is never smaller than 1 in the label's logit. All derivatives
    exist, forward-mode ones too.

    Args:
        logits: [N, V], float32 or wider.
        labels: [N], int64.

    Returns:
        [N], the dtype of `logits`.
    """
    others = torch.logsumexp(without_label(logits, labels), 1)
    return (logits.gather(1, labels.unsqueeze(1)).squeeze(1) - others).clamp(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT)


@dataclass(frozen=True)
class MinibatchTotals:
    """Counts over the *global* minibatch: all ranks, all micro-batches; those of a sample, scaled."""

    num_forget_records: float
    num_retain_records: float
    num_forget_tokens: float
    num_retain_tokens: float

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
    start_nll: Tensor
    """[B]: `nll` under the weights at the round's start, a constant; NaN where no objective reads it."""


@dataclass(frozen=True, eq=False)
class Constants:
    """What was known of each prediction at the round's start: [N] each; NaN where no objective reads it."""

    start_nll: Tensor
    """`-log p` of the label, nats."""
    start_log_odds: Tensor
    target_log_odds: Tensor
    """Where the label's log-odds are to go."""
    uniform: Tensor | None = None
    """One number in [0, 1) a prediction, by which a random label is chosen; None where no objective reads it."""

    def of(self, chosen: Tensor) -> "Constants":
        """Those of some predictions: [N], bool."""
        columns = (self.start_nll, self.start_log_odds, self.target_log_odds, self.uniform)
        return Constants(*(column if column is None else column[chosen] for column in columns))  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        shapes = {tuple(x.shape) for x in (self.start_nll, self.start_log_odds, self.target_log_odds)}
        assert len(shapes) == 1, f"shapes {shapes}, expected three times [N]"


@dataclass(frozen=True, eq=False)
class LabelledLogits:
    """N predictions with their labels, whose records are not looked at.

    Sums over a wide vocabulary are not done in half precision: what is computed here is float32 or wider, and has
    first and second derivatives and forward-mode ones, in every grad mode.
    """

    logits: Tensor
    """[N, V], any floating dtype."""
    labels: Tensor
    """[N], int64."""

    def __post_init__(self) -> None:
        shapes = tuple(self.logits.shape), tuple(self.labels.shape)
        assert self.logits.dim() == 2 and self.labels.shape == self.logits.shape[:1], f"shapes {shapes}"

    @cached_property
    def wide(self) -> Tensor:
        """The logits, float32 or wider."""
        return self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))

    @cached_property
    def nll(self) -> Tensor:
        """[N]: `-log softmax(logits[n])[labels[n]]`, nats; has a graph even where N is 0."""
        return functional.cross_entropy(self.wide, self.labels, reduction="none")

    @cached_property
    def log_odds(self) -> Tensor:
        """[N]: see `log_odds`."""
        return log_odds(self.wide, self.labels)

    @cached_property
    def hits(self) -> Tensor:
        """[N], bool: whether the arg max is the label."""
        return self.logits.detach().argmax(-1) == self.labels


@dataclass(frozen=True, eq=False)
class Predictions(LabelledLogits):
    """One micro-batch on this rank: N predictions of B records. A record without predictions is padding."""

    record: Tensor
    """[N], int64: the record each prediction belongs to, from 0 to B - 1."""
    is_forget: Tensor
    """[B], bool."""
    constants: Constants
    """[N] each."""
    start_logits: Tensor | None = None
    """[N, V] under the weights at the round's start, a constant; None where no objective reads it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.record.shape == self.labels.shape and self.is_forget.dim() == 1
        assert self.is_forget.dtype == torch.bool, f"is_forget is {self.is_forget.dtype}, not bool"
        assert self.constants.start_nll.shape == self.labels.shape, "constants of other predictions"
        assert self.start_logits is None or self.start_logits.shape == self.logits.shape

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
        start = self.per_record(self.constants.start_nll)
        return RecordSums(self.per_record(self.nll)[chosen], self.num_tokens[chosen], start[chosen])

    def alone(self, record: int) -> "Predictions":
        """One record's predictions, detached, in float64."""
        chosen = self.record == record
        return Predictions(
            self.logits.detach()[chosen].double(),
            self.labels[chosen],
            torch.zeros_like(self.record[chosen]),
            self.is_forget[record : record + 1],
            self.constants.of(chosen),
            None if self.start_logits is None else self.start_logits[chosen].double(),
        )

    def of_role(self, is_forget: bool) -> Tensor:
        """[N], bool: whether the prediction belongs to a forget (or a retain) record."""
        return self.is_forget[self.record] == is_forget
