"""Parts of objectives that look at records: sums over local records, divided by counts of the global minibatch.

Every function here returns this rank's *share*: shares of all ranks and micro-batches add up to the value on
the whole minibatch. A record without predictions is padding (an empty micro-batch has one) and counts
nowhere: neither here nor in `MinibatchTotals`. A sum over no records is an exact 0 that still has a graph.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from distributed_unlearn.objectives.predictions import MinibatchTotals, Predictions
from distributed_unlearn.objectives.terms import Needs, huber


def retain_loss(predictions: Predictions, totals: MinibatchTotals) -> Tensor:
    """Share of the retain loss, `sum of nll over retain records / num_retain_tokens`: nats per token."""
    return predictions.records_of(is_forget=False).nll.sum() / max(totals.num_retain_tokens, 1)


def forget_loss(predictions: Predictions, totals: MinibatchTotals) -> Tensor:
    """Share of the forget loss, `sum of nll over forget records / num_forget_tokens`: nats per token."""
    return predictions.records_of(is_forget=True).nll.sum() / max(totals.num_forget_tokens, 1)


def forget_distance(predictions: Predictions, totals: MinibatchTotals, holdout_loss: float) -> Tensor:
    """Share of the mean over forget records of `|nll_i / L_i - holdout_loss|`: nats per token."""
    forget = predictions.records_of(is_forget=True)
    return (forget.nll / forget.num_tokens - holdout_loss).abs().sum() / max(totals.num_forget_records, 1)


@dataclass(frozen=True)
class RetainLossTerm:
    """The retain loss, nats per token: what the paper minimises (Bui et al., arXiv 2406.14507)."""

    needs = Needs()

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """`(sum of nll over retain records) / num_retain_tokens`."""
        return retain_loss(predictions, totals)


@dataclass(frozen=True)
class AscentTerm:
    """Minus the forget loss, nats per token. Unbounded below."""

    needs = Needs()

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """`-(sum of nll over forget records) / num_forget_tokens`."""
        return -forget_loss(predictions, totals)


@dataclass(frozen=True)
class NegativePreferenceTerm:
    """Negative preference of the answer against the round's starting weights.

    `mean over forget records of -(2 / beta) log sigmoid(-beta (log p(y) - log p_ref(y)))`, with `log p` summed
    over the answer's tokens (Zhang, Lin, Bai, Mei 2024, arXiv 2404.05868, equation 3). At the reference the
    value is `(2 / beta) log 2`.
    """

    beta: float
    needs = Needs(start=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share; every forget record needs a finite `start_nll`."""
        forget = predictions.records_of(is_forget=True)
        excess = forget.nll - forget.start_nll.detach().to(forget.nll.dtype)
        # logsigmoid and not softplus (turns linear at 20) or logaddexp (NaN second derivative beyond exp's range).
        return functional.logsigmoid(self.beta * excess).sum() * (-2 / self.beta) / max(totals.num_forget_records, 1)


@dataclass(frozen=True)
class SimpleNegativePreferenceTerm:
    """Negative preference without a reference, length-normalised, margin 0.

    `mean over forget records of -(2 / beta) log sigmoid(-(beta / L_i) log p(y_i))` (Fan et al. 2024,
    arXiv 2410.07163, equation 4 with gamma = 0).
    """

    beta: float
    needs = Needs()

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share."""
        forget = predictions.records_of(is_forget=True)
        mean_nll = forget.nll / forget.num_tokens
        return functional.logsigmoid(self.beta * mean_nll).sum() * (-2 / self.beta) / max(totals.num_forget_records, 1)


@dataclass(frozen=True)
class HoldoutDistanceTerm:
    """Two-sided penalty that makes forget records as hard as held-out ones; bounded below by 0.

    `mean over forget records of phi(nll_i / L_i - holdout_loss)` with `phi(x) = x^2 / 2` up to `|x| = delta` and
    `delta (|x| - delta / 2)` beyond it (Huber 1964); `delta = inf` gives the squared penalty everywhere.
    """

    holdout_loss: float
    """Mean loss on held-out records at the round's start, nats per token."""
    delta: float
    needs = Needs(holdout_loss=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share."""
        forget = predictions.records_of(is_forget=True)
        distance = forget.nll / forget.num_tokens - self.holdout_loss
        return huber(distance, self.delta).sum() / max(totals.num_forget_records, 1)
