"""Plain records of what happened: per step, per round, per evaluated set. Standard library only.

Ids and scalars, never text. `dataclasses.asdict` turns each into JSON.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """Everything scalar about one outer step."""

    step: int
    loss: float
    gradient_norm: float
    alpha: float | None
    """Dual variable of the cubic model; equals `||Delta||` at its solution."""
    gamma: float | None
    """Implied damping `M alpha / 2`."""
    cubic_coefficient: float | None
    """M with which the accepted (or last) trial was computed."""
    update_norm: float
    """`||Delta||`; 0 when the step was rejected for good."""
    smallest_ritz_value: float | None
    largest_ritz_value: float | None
    residual: float | None
    """Cubic model's residual over `||g||`."""
    predicted_reduction: float | None
    actual_reduction: float | None
    acceptance_ratio: float | None
    accepted: bool
    num_rejections: int
    num_krylov_steps: int
    num_products: int
    result: str
    """Name of the inner solver's `Result` member."""
    wall_seconds: float
    terms: dict[str, float] = field(default_factory=dict)
    """Objective parts at the start of the step."""


@dataclass(frozen=True)
class SetScores:
    """One model on one set of records; means over records, each record scored once."""

    num_records: int
    num_answer_tokens: int
    loss_nats_per_token: float
    """Mean over records of a record's mean answer loss."""
    exact_memorisation: float
    """Mean over records of the share of answer positions whose teacher-forced argmax is the label."""


@dataclass(frozen=True)
class RoundRecord:
    """One round: what was asked, how it went, how all sets stand afterwards."""

    round_index: int
    num_forget_records: int
    num_retain_records: int
    holdout_loss_nats_per_token: float | None
    """The target of holdout_matched and of the stopping rule, measured once at the start of the round."""
    stop_reason: str
    num_steps: int
    num_products: int
    update_norm: float
    """`||w_end - w_start||` of the round."""
    wall_seconds: float
    steps: tuple[StepRecord, ...]
    before: dict[str, SetScores]
    after: dict[str, SetScores]
    """Keys `forget`, `retain`, `holdout` and, for earlier rounds, `forget_round_<k>`."""
    tug_of_war: float | None = None
