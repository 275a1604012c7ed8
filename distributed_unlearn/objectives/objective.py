"""What is minimised: `retain_weight * retain term + forget_weight * forget term`, for all objectives."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distributed_unlearn.objectives.predictions import MinibatchTotals, Predictions
from distributed_unlearn.objectives.record_terms import RetainLossTerm, forget_distance, forget_loss, retain_loss
from distributed_unlearn.objectives.terms import Needs, Term


class Objective(Protocol):
    """A function of predictions that is a sum over records, given the global counts.

    Both methods return this rank's share on one micro-batch: shares of all ranks and micro-batches of a
    minibatch add up to the value on the minibatch. Nothing here communicates.
    """

    @property
    def forget_needs(self) -> Needs | None:
        """What is read of forget records beside their logits; None where they do not change the value."""
        ...

    @property
    def retain_needs(self) -> Needs | None:
        """What is read of retain records beside their logits; None where they do not change the value."""
        ...

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """The share, scalar in the dtype of `Predictions.wide`, twice differentiable.

        A role that this micro-batch or the whole minibatch lacks contributes an exact 0 that still has a graph.
        """
        ...

    def terms(self, predictions: Predictions, totals: MinibatchTotals) -> dict[str, Tensor]:
        """Shares of the named parts, detached scalars, unweighted. To be called after the value was computed.

        Keys depend on `totals` alone, so all ranks and micro-batches have the same: with retain tokens
        `retain_loss_nats_per_token`, and `retain_term` where that is another one; with forget tokens
        `forget_loss_nats_per_token`, `forget_term` where one is in use, and `forget_distance_nats` (mean over
        forget records of `|nll_i / L_i - holdout loss|`) where the holdout loss is known.
        """
        ...


@dataclass(frozen=True)
class WeightedObjective:
    """`retain_weight * retain term + forget_weight * forget term`; implements `Objective`."""

    retain_weight: float
    forget_weight: float
    retain_term: Term
    forget_term: Term | None
    holdout_loss: float | None
    """Nats per token; for the part `forget_distance_nats`, whichever the objective."""

    @property
    def forget_needs(self) -> Needs | None:
        """What is read of forget records; None where they do not change the value."""
        return self.forget_term.needs if self.forget_term is not None and self.forget_weight > 0 else None

    @property
    def retain_needs(self) -> Needs | None:
        """What is read of retain records; None where they do not change the value."""
        return self.retain_term.needs if self.retain_weight > 0 else None

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """The share; see `Objective`."""
        parts = []
        if self.retain_needs is not None:
            parts.append(self.retain_weight * self.retain_term(predictions, totals))
        if self.forget_term is not None and self.forget_needs is not None:
            parts.append(self.forget_weight * self.forget_term(predictions, totals))
        return torch.stack(parts).sum()

    @torch.no_grad()
    def terms(self, predictions: Predictions, totals: MinibatchTotals) -> dict[str, Tensor]:
        """Shares of the named parts, detached; see `Objective`."""
        parts: dict[str, Tensor] = {}
        if totals.num_retain_tokens > 0:
            parts["retain_loss_nats_per_token"] = retain_loss(predictions, totals)
            if self.retain_needs is not None and not isinstance(self.retain_term, RetainLossTerm):
                parts["retain_term"] = self.retain_term(predictions, totals)
        if totals.num_forget_tokens > 0:
            parts["forget_loss_nats_per_token"] = forget_loss(predictions, totals)
            if self.forget_term is not None and self.forget_needs is not None:
                parts["forget_term"] = self.forget_term(predictions, totals)
            if self.holdout_loss is not None:
                parts["forget_distance_nats"] = forget_distance(predictions, totals, self.holdout_loss)
        return {name: value.detach() for name, value in parts.items()}
