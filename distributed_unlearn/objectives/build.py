"""From the job's objective section to the objective."""

import math

from distributed_unlearn.config import ObjectiveConfig
from distributed_unlearn.errors import ConfigError, NumericalError
from distributed_unlearn.objectives.label_terms import RandomLabelTerm
from distributed_unlearn.objectives.objective import Objective, WeightedObjective
from distributed_unlearn.objectives.record_terms import (
    AscentTerm,
    HoldoutDistanceTerm,
    NegativePreferenceTerm,
    RetainLossTerm,
    SimpleNegativePreferenceTerm,
)
from distributed_unlearn.objectives.steering import SteeringObjective
from distributed_unlearn.objectives.teacher_terms import (
    DeleteTerm,
    DepartureTerm,
    KeptDistributionTerm,
    TaughtLossTerm,
    UndialTerm,
    WithAlternatives,
)
from distributed_unlearn.objectives.terms import Term
from distributed_unlearn.objectives.token_terms import KeptLogOddsTerm, MatchedLogOddsTerm


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


def _forget_term(config: ObjectiveConfig, holdout_loss: float | None) -> Term | None:
    match config.name:
        case "retain" | "rmu":
            return None
        case "gradient_ascent" | "graddiff":
            return AscentTerm()
        case "npo":
            return NegativePreferenceTerm(config.beta)
        case "simnpo":
            return SimpleNegativePreferenceTerm(config.beta)
        case "holdout_matched":
            return _holdout_term(config, _checked_holdout_loss(holdout_loss))
        case "token_matched":
            term = MatchedLogOddsTerm(config.huber_delta)
            return WithAlternatives(term, config.alternatives_weight) if config.alternatives_weight > 0 else term
        case "undial":
            return UndialTerm(config.undial_strength)
        case "delete":
            return DeleteTerm()
        case "random_labels":
            return RandomLabelTerm()
        case "scrub":
            return DepartureTerm()


def _retain_term(config: ObjectiveConfig) -> Term:
    if config.name == "scrub":
        return TaughtLossTerm(config.distillation_weight)
    match config.retain_term:
        case "loss":
            return RetainLossTerm()
        case "log_odds":
            return KeptLogOddsTerm()
        case "kl":
            return KeptDistributionTerm()


def build_objective(config: ObjectiveConfig, holdout_loss: float | None, seed: int = 0) -> Objective:
    """The configured objective.

    With `R` the retain term (the retain loss, unless `retain` says otherwise), `F` the forget loss (token means over
    the minibatch) and `r`, `f` the weights: retain `r R` (Bui et al., arXiv 2406.14507); gradient_ascent `-f F`;
    graddiff `r R - f F` (Liu, Liu, Stone 2022); all others `r R + f *` the term of `NegativePreferenceTerm` (npo),
    `SimpleNegativePreferenceTerm` (simnpo), `HoldoutDistanceTerm` (holdout_matched), `MatchedLogOddsTerm`
    (token_matched, whose `R` is `KeptLogOddsTerm`), `UndialTerm` (undial), `DeleteTerm` (delete), `RandomLabelTerm`
    (random_labels) or `DepartureTerm` (scrub, whose `R` is `TaughtLossTerm`). rmu is `SteeringObjective`.

    Args:
        config: objective section of the job.
        holdout_loss: mean loss of the holdout set at the round's start, nats per token. Needed by
            holdout_matched; with any other objective it only adds the part `forget_distance_nats`.
        seed: of what an objective draws at random; of rmu its vector.

    Raises:
        ConfigError: holdout_matched without `holdout_loss`, or weights that leave nothing to minimise.
        NumericalError: `holdout_loss` is NaN or infinite.
    """
    if holdout_loss is not None and not math.isfinite(holdout_loss):
        raise NumericalError(
            f"a holdout loss of {holdout_loss}", "a finite number", "check the weights and the holdout records"
        )
    objective: Objective
    retain_weight = 0.0 if config.name == "gradient_ascent" else config.retain_weight
    if config.name == "rmu":
        objective = SteeringObjective(retain_weight, config.forget_weight, config.steering_coefficient, seed)
    else:
        term = _forget_term(config, holdout_loss)
        objective = WeightedObjective(retain_weight, config.forget_weight, _retain_term(config), term, holdout_loss)
    if objective.forget_needs is None and objective.retain_needs is None:
        raise ConfigError(
            f"objective {config.name} with every weight in use at 0",
            "a positive weight on at least one term",
            "raise objective.retain_weight or objective.forget_weight",
        )
    return objective
