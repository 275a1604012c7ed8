"""From the job's objective section to the objective."""

import math

from distributed_unlearn.config import ObjectiveConfig
from distributed_unlearn.errors import ConfigError, NumericalError
from distributed_unlearn.objectives.objective import Objective, WeightedObjective
from distributed_unlearn.objectives.record_terms import (
    AscentTerm,
    ForgetTerm,
    HoldoutDistanceTerm,
    NegativePreferenceTerm,
    SimpleNegativePreferenceTerm,
)


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
