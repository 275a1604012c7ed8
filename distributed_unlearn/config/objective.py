"""What is minimised, as the job file says it."""

from typing import Literal

from pydantic import Field

from distributed_unlearn.config.base import StrictModel


class ObjectiveConfig(StrictModel):
    """What is minimised. Each objective is defined in `distributed_unlearn.objectives`."""

    name: Literal["retain", "gradient_ascent", "graddiff", "npo", "simnpo", "holdout_matched"] = "holdout_matched"
    forget_weight: float = Field(default=1.0, ge=0.0)
    retain_weight: float = Field(default=1.0, ge=0.0)
    beta: float = Field(default=0.1, gt=0.0)
    """npo, simnpo: inverse temperature (0.1 in Zhang et al. 2024)."""
    penalty: Literal["huber", "squared"] = "huber"
    """holdout_matched: shape of the two-sided distance to the holdout loss."""
    huber_delta: float = Field(default=1.0, gt=0.0)
    """holdout_matched: nats per token at which the Huber penalty turns linear."""
