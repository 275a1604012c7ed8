"""What is minimised, as the job file says it."""

from typing import Literal

from pydantic import Field, model_validator

from distributed_unlearn.config.base import StrictModel

ObjectiveName = Literal[
    "retain",
    "gradient_ascent",
    "graddiff",
    "random_labels",
    "npo",
    "simnpo",
    "holdout_matched",
    "token_matched",
    "undial",
    "delete",
    "scrub",
    "rmu",
]

_OWNERS: dict[str, tuple[ObjectiveName, ...]] = {
    "beta": ("npo", "simnpo"),
    "penalty": ("holdout_matched",),
    "huber_delta": ("holdout_matched", "token_matched"),
    "target_from": ("token_matched",),
    "order": ("token_matched",),
    "alternatives_weight": ("token_matched",),
    "undial_strength": ("undial",),
    "distillation_weight": ("scrub",),
    "steering_coefficient": ("rmu",),
}
"""The objectives that each setting belongs to; a value of another objective's that is not the default is refused."""


class ObjectiveConfig(StrictModel):
    """What is minimised. Each objective is defined in `distributed_unlearn.objectives`."""

    name: ObjectiveName = "token_matched"
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
    target_from: Literal["holdout", "base_model"] = "holdout"
    """token_matched: where forget tokens' log-odds are to go. `holdout`: to those of the holdout set's tokens, rank by
    rank; a text never seen has easy and hard tokens. `base_model`: each token to its own log-odds in
    `data.base_model`, the checkpoint before fine-tuning, for users who hold nothing out."""
    order: Literal["start", "refreshed"] = "start"
    """token_matched with a holdout set: the ranks. `start`: those at the round's start, a fixed objective.
    `refreshed`: those of each token's last seen log-odds: targets follow tokens that overtake others, as they do
    where some records share what they say with retained ones."""
    alternatives_weight: float = Field(default=0.0, ge=0.0)
    """token_matched: weight of keeping the round-start distribution over the tokens beside the label, so that what the
    label loses goes where the model had already thought of; nearer to a retrained model token by token, at the cost
    of another forward pass a step."""
    undial_strength: float = Field(default=10.0, gt=0.0)
    """undial: by how much the label's logit is lowered (3 to 30 in Dong et al. 2024)."""

    distillation_weight: float = Field(default=1.0, ge=0.0)
    """scrub: weight of staying near the teacher on retain records, beside their loss (alpha / gamma of Kurmanji et al.
    2023; gamma is `retain_weight`)."""

    steering_coefficient: float = Field(default=6.5, gt=0.0)
    """rmu: c, the length that hidden states of forget records are steered to (6.5 in Li et al. 2024, for Zephyr-7B; a
    few times the length that they have)."""

    @model_validator(mode="after")
    def _settings_are_its_own(self) -> "ObjectiveConfig":
        for key, owners in _OWNERS.items():
            if self.name not in owners and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} belongs to {' and '.join(owners)}, not to {self.name}; remove it or choose that objective"
                )
        if self.name in ("scrub", "rmu") and self.retain is not None:
            raise ValueError(f"retain is fixed for {self.name}, which has a retain term of its own; remove it")
        if self.order == "refreshed" and self.target_from != "holdout":
            raise ValueError("order refreshed ranks against a holdout set; with target_from base_model leave it out")
        return self

    @property
    def retain_term(self) -> Literal["log_odds", "loss", "kl"]:
        """`retain`, or what it stands for when null."""
        if self.retain is not None:
            return self.retain
        return "log_odds" if self.name == "token_matched" else "loss"

    @property
    def uses_log_odds(self) -> bool:
        """Whether forget tokens are looked at one by one, by their log-odds."""
        return self.name == "token_matched"

    @property
    def uses_base_model(self) -> bool:
        """Whether the checkpoint before fine-tuning says where forget tokens are to go."""
        return self.uses_log_odds and self.target_from == "base_model"

    @property
    def uses_holdout(self) -> bool:
        """Whether the objective cannot do without a holdout set."""
        return self.name == "holdout_matched" or (self.uses_log_odds and self.target_from == "holdout")
