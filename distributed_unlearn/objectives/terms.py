"""What a term of an objective is, and what it needs to be told beside the logits."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distributed_unlearn.objectives.predictions import MinibatchTotals, Predictions


@dataclass(frozen=True)
class Needs:
    """What a term reads of the round's start; what it does not read may be NaN or None."""

    start: bool = False
    """The label's loss and log-odds at the round's start (`Constants.start_*`), of the term's own records."""
    target: bool = False
    """`Constants.target_log_odds`."""
    start_logits: bool = False
    """`Predictions.start_logits`: another forward pass of every minibatch, at the round's first weights."""
    holdout_loss: bool = False
    """The mean loss of the holdout set, when the term is built."""
    uniform: bool = False
    """`Constants.uniform`."""

    def __or__(self, other: "Needs") -> "Needs":
        """What either of two terms needs."""
        return Needs(
            self.start or other.start,
            self.target or other.target,
            self.start_logits or other.start_logits,
            self.holdout_loss or other.holdout_loss,
            self.uniform or other.uniform,
        )


class Term(Protocol):
    """What an objective does to the records of one role; smaller is better."""

    @property
    def needs(self) -> Needs:
        """What it reads beside the logits."""
        ...

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share, scalar; the records of the term's role are picked out."""
        ...


def huber(distance: Tensor, delta: float) -> Tensor:
    """`x^2 / 2` up to `|x| = delta` and `delta (|x| - delta / 2)` beyond it (Huber 1964), elementwise."""
    # With c = clip(x), c (x - c / 2) is Huber's function, and its second derivative is 1 at x = 0 as well;
    # pointwise operations alone, so forward-mode derivatives of the backward pass exist in every grad mode.
    clipped = distance.clamp(-delta, delta)
    return clipped * (distance - clipped / 2)
