"""What is minimised: `retain_weight * retain loss + forget_weight * forget term`, for all objectives."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distributed_unlearn.config import ObjectiveConfig
from distributed_unlearn.errors import ConfigError, NumericalError
from distributed_unlearn.objectives.terms import (
    AscentTerm,
    ForgetTerm,
    HoldoutDistanceTerm,
    MinibatchTotals,
    NegativePreferenceTerm,
    SequenceBatch,
    SimpleNegativePreferenceTerm,
    forget_distance,
    forget_loss,
    retain_loss,
)


class Objective(Protocol):
    """A function of per-record losses that is a sum over records, given the global counts.

    Both methods return this rank's share on one micro-batch: shares of all ranks and micro-batches of a
    minibatch add up to the value on the minibatch. Nothing here communicates.
    """

    @property
    def uses_forget(self) -> bool:
        """Whether forget records change the value."""
        ...

    @property
    def uses_retain(self) -> bool:
        """Whether retain records change the value."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether `SequenceBatch.reference_nll` of forget records is read."""
        ...

    @property
    def needs_holdout_loss(self) -> bool:
        """Whether the mean loss on the holdout set had to be known."""
        ...

    def __call__(self, batch: SequenceBatch, totals: MinibatchTotals) -> Tensor:
        """The share, scalar in `nll`'s dtype, twice differentiable.

        A role that this micro-batch or the whole minibatch lacks contributes an exact 0 that still has a graph.
        """
        ...

    def terms(self, batch: SequenceBatch, totals: MinibatchTotals) -> dict[str, Tensor]:
        """Shares of the named parts, detached scalars, unweighted.

        Keys depend on `totals` alone, so all ranks and micro-batches have the same: with retain tokens
        `retain_loss_nats_per_token`; with forget tokens `forget_loss_nats_per_token`, `forget_term` where
        one is in use, and `forget_distance_nats` (mean over forget records of `|nll_i / L_i - holdout loss|`)
        where the holdout loss is known.
        """
        ...


@dataclass(frozen=True)
class WeightedObjective:
    """`retain_weight * retain loss + forget_weight * forget term`; implements `Objective`."""

    retain_weight: float
    forget_weight: float
    forget_term: ForgetTerm | None
    holdout_loss: float | None
    """Nats per token; for the part `forget_distance_nats`, whichever the objective."""

    @property
    def uses_forget(self) -> bool:
        """Whether forget records change the value."""
        return self.forget_term is not None and self.forget_weight > 0

    @property
    def uses_retain(self) -> bool:
        """Whether retain records change the value."""
        return self.retain_weight > 0

    @property
    def needs_reference(self) -> bool:
        """Whether `SequenceBatch.reference_nll` of forget records is read."""
        return self.forget_term is not None and self.uses_forget and self.forget_term.needs_reference

    @property
    def needs_holdout_loss(self) -> bool:
        """Whether the mean loss on the holdout set had to be known."""
        return isinstance(self.forget_term, HoldoutDistanceTerm)

    def __call__(self, batch: SequenceBatch, totals: MinibatchTotals) -> Tensor:
        """The share, scalar in `nll`'s dtype; see `Objective`."""
        parts = []
        if self.uses_retain:
            parts.append(self.retain_weight * retain_loss(batch, totals))
        if self.forget_term is not None and self.uses_forget:
            parts.append(self.forget_weight * self.forget_term(batch, totals))
        return torch.stack(parts).sum()

    def terms(self, batch: SequenceBatch, totals: MinibatchTotals) -> dict[str, Tensor]:
        """Shares of the named parts, detached; see `Objective`."""
        parts: dict[str, Tensor] = {}
        if totals.num_retain_tokens > 0:
            parts["retain_loss_nats_per_token"] = retain_loss(batch, totals)
        if totals.num_forget_tokens > 0:
            parts["forget_loss_nats_per_token"] = forget_loss(batch, totals)
            if self.forget_term is not None and self.uses_forget:
                parts["forget_term"] = self.forget_term(batch, totals)
            if self.holdout_loss is not None:
                parts["forget_distance_nats"] = forget_distance(batch, totals, self.holdout_loss)
        return {name: value.detach() for name, value in parts.items()}


def _checked_holdout_loss(holdout_loss: float | None) -> float:
    if holdout_loss is None:
        raise ConfigError(
            "objective holdout_matched without a holdout loss",
            "a holdout selection, whose mean loss the forget records are brought to",
            "name a holdout set or choose another objective",
        )
    return holdout_loss


def _holdout_term(config: ObjectiveConfig, holdout_loss: float) -> HoldoutDistanceTerm:
    match config.penalty:
        case "huber":
            return HoldoutDistanceTerm(holdout_loss, config.huber_delta)
        case "squared":
            return HoldoutDistanceTerm(holdout_loss, math.inf)


def build_objective(config: ObjectiveConfig, holdout_loss: float | None) -> Objective:
    """The configured objective.

    With `R` the retain loss and `F` the forget loss (token means over the minibatch):
    retain `r R` (Bui et al., arXiv 2406.14507); gradient_ascent `-f F`; graddiff `r R - f F` (Liu, Liu, Stone
    2022); npo, simnpo and holdout_matched `r R + f *` the term of `NegativePreferenceTerm`,
    `SimpleNegativePreferenceTerm` and `HoldoutDistanceTerm`; `r`, `f` are `retain_weight`, `forget_weight`.

    Args:
        config: objective section of the job.
        holdout_loss: mean loss of the holdout set at the round's start, nats per token. Needed by
            holdout_matched; with any other objective it only adds the part `forget_distance_nats`.

    Raises:
        ConfigError: holdout_matched without `holdout_loss`, or weights that leave nothing to minimise.
        NumericalError: `holdout_loss` is NaN or infinite.
    """
    if holdout_loss is not None and not math.isfinite(holdout_loss):
        raise NumericalError(
            f"a holdout loss of {holdout_loss}", "a finite number", "check the weights and the holdout records"
        )
    retain_weight = config.retain_weight
    term: ForgetTerm | None = None
    match config.name:
        case "retain":
            pass
        case "gradient_ascent":
            retain_weight, term = 0.0, AscentTerm()
        case "graddiff":
            term = AscentTerm()
        case "npo":
            term = NegativePreferenceTerm(config.beta)
        case "simnpo":
            term = SimpleNegativePreferenceTerm(config.beta)
        case "holdout_matched":
            term = _holdout_term(config, _checked_holdout_loss(holdout_loss))
    objective = WeightedObjective(retain_weight, config.forget_weight, term, holdout_loss)
    if not (objective.uses_forget or objective.uses_retain):
        raise ConfigError(
            f"objective {config.name} with every weight in use at 0",
            "a positive weight on at least one term",
            "raise objective.retain_weight or objective.forget_weight",
        )
    return objective
