"""Parts of objectives that compare whole distributions with those at the round's start.

They need `Predictions.start_logits`: one more forward pass of every minibatch, at the round's first weights, which a
rank keeps as a shard on the host anyway. Sums over the vocabulary are in float32 or wider.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from distributed_unlearn.objectives.predictions import MinibatchTotals, Predictions, without_label
from distributed_unlearn.objectives.record_terms import retain_loss
from distributed_unlearn.objectives.terms import Needs, Term


def _of_role(predictions: Predictions, is_forget: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, logits at the start and labels of one role's predictions."""
    assert predictions.start_logits is not None, "start_logits were not computed"
    chosen, wide = predictions.of_role(is_forget), predictions.wide
    return wide[chosen], predictions.start_logits.detach().to(wide.dtype)[chosen], predictions.labels[chosen]


def _divergence(start: Tensor, now: Tensor) -> Tensor:
    """Sum over rows of `KL(softmax(start) | softmax(now))`, nats."""
    log_p = functional.log_softmax(start, -1)
    return (log_p.exp() * (log_p - functional.log_softmax(now, -1))).sum()


@dataclass(frozen=True)
class UndialTerm:
    """Self-distillation with adjusted logits (UNDIAL; Dong et al. 2024, arXiv 2402.10052, equations 2 and 3).

    `mean over forget predictions of -sum_v q_v log p_v` with `q = softmax(z_start - strength e_y)`: the distribution
    at the round's start with the label's logit lowered.
    """

    strength: float
    needs = Needs(start_logits=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share."""
        now, start, labels = _of_role(predictions, is_forget=True)
        lowered = start - self.strength * functional.one_hot(labels, start.shape[1])
        crossed = lowered.softmax(-1) * functional.log_softmax(now, -1)
        return -crossed.sum() / max(totals.num_forget_tokens, 1)


@dataclass(frozen=True)
class DeleteTerm:
    """Decoupled distillation (DELETE; Zhou et al., CVPR 2025, arXiv 2503.23751).

    `mean over forget predictions of KL(c_start | p)`, `c_start` the softmax at the round's start with the label's
    logit at minus infinity: the label is to lose all its probability to what the model had thought of beside it.
    """

    needs = Needs(start_logits=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share."""
        now, start, labels = _of_role(predictions, is_forget=True)
        return _divergence(without_label(start, labels), now) / max(totals.num_forget_tokens, 1)


@dataclass(frozen=True)
class AlternativesTerm:
    """What the model had thought of beside the label is kept: `mean over forget predictions of KL(c_start | c)`.

    `c` is the softmax without the label. Blind to the label's own probability, which another term moves; without it a
    forget term is free to spread that probability anywhere.
    """

    needs = Needs(start_logits=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share."""
        now, start, labels = _of_role(predictions, is_forget=True)
        return _divergence(without_label(start, labels), without_label(now, labels)) / max(totals.num_forget_tokens, 1)


@dataclass(frozen=True)
class KeptDistributionTerm:
    """Retain tokens' distributions are kept: `mean over retain predictions of KL(p_start | p)`, nats."""

    needs = Needs(start_logits=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share."""
        now, start, _ = _of_role(predictions, is_forget=False)
        return _divergence(start, now) / max(totals.num_retain_tokens, 1)


@dataclass(frozen=True)
class DepartureTerm:
    """SCRUB's ascent (Kurmanji, Triantafillou, Hayes, Triantafillou 2023, arXiv 2302.09880).

    `-(mean over forget predictions of KL(p_start | p))`: away from the teacher, which is the round's start. Unbounded
    below, and with a gradient of exactly zero at the teacher's own weights.
    """

    needs = Needs(start_logits=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share."""
        now, start, _ = _of_role(predictions, is_forget=True)
        return -_divergence(start, now) / max(totals.num_forget_tokens, 1)


@dataclass(frozen=True)
class TaughtLossTerm:
    """SCRUB's descent (Kurmanji et al. 2023, arXiv 2302.09880): the labels, and the teacher.

    `mean over retain predictions of -log p_y + weight KL(p_start | p)`.
    """

    weight: float
    needs = Needs(start_logits=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share."""
        kept = KeptDistributionTerm()(predictions, totals)
        return retain_loss(predictions, totals) + self.weight * kept


@dataclass(frozen=True)
class WithAlternatives:
    """A forget term plus `weight` times `AlternativesTerm`."""

    term: Term
    weight: float

    @property
    def needs(self) -> Needs:
        """What either part needs."""
        return self.term.needs | AlternativesTerm.needs

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share."""
        return self.term(predictions, totals) + self.weight * AlternativesTerm()(predictions, totals)
