"""What is minimised, as the job file says it."""

from typing import Literal

from pydantic import Field

from distributed_unlearn.config.base import StrictModel


class ObjectiveConfig(StrictModel):
    """What is minimised. Each objective is defined in `distributed_unlearn.objectives`."""

    name: Literal[
        "retain",
        "gradient_ascent",
        "graddiff",
        "npo",
        "simnpo",
        "holdout_matched",
        "token_matched",
        "undial",
        "delete",
    ] = "holdout_matched"
    forget_weight: float = Field(default=1.0, ge=0.0)
    retain_weight: float = Field(default=1.0, ge=0.0)
    retain: Literal["log_odds", "loss", "kl"] | None = None
    """What is asked of retain records: their tokens' log-odds where they were at the round's start, a small loss, or
    the distributions that they had (another forward pass a step). null: log_odds for token_matched, loss for all
    others, as published."""
    beta: float = Field(default=0.1, gt=0.0)
    """npo, simnpo: inverse temperature (0.1 in Zhang et al. 2024)."""
    penalty: Literal["huber", "squared"] = "huber"
    """holdout_matched: shape of the two-sided distance to the holdout loss."""
    huber_delta: float = Field(default=1.0, gt=0.0)
    """holdout_matched: nats per token, token_matched: log-odds, at which the Huber penalty turns linear."""
    alternatives_weight: float = Field(default=0.0, ge=0.0)
    """token_matched: weight of keeping the round-start distribution over the tokens beside the label, so that what the
    label loses goes where the model had already thought of; nearer to a retrained model token by token, at the cost
    of another forward pass a step."""
    undial_strength: float = Field(default=10.0, gt=0.0)
    """undial: by how much the label's logit is lowered (3 to 30 in Dong et al. 2024)."""

    @property
    def retain_term(self) -> Literal["log_odds", "loss", "kl"]:
        """`retain`, or what it stands for when null."""
        if self.retain is not None:
            return self.retain
        return "log_odds" if self.name == "token_matched" else "loss"

    @property
    def uses_holdout(self) -> bool:
        """Whether the objective cannot do without a holdout set."""
        return self.name in ("holdout_matched", "token_matched")
