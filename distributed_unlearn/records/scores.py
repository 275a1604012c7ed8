"""Scores of one model on one set of records. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SetScores:
    """One model on one set of records; means over records, each record scored once."""

    num_records: int
    num_answer_tokens: int
    loss_nats_per_token: float
    """Mean over records of a record's mean answer loss."""
    exact_memorisation: float
    """Mean over records of the share of answer positions whose teacher-forced argmax is the label."""
    loss_quantiles: tuple[float, ...] | None = None
    """How the records' mean answer losses are spread: the quantiles 0, 0.02, ..., 1, nats per token. None: a record of
    a version that did not keep them."""
