"""One round: what was asked, how it went, how all sets stand afterwards. Standard library only."""

from dataclasses import dataclass

from distributed_unlearn.records.exposure import Exposure
from distributed_unlearn.records.scores import SetScores
from distributed_unlearn.records.step import StepRecord
from distributed_unlearn.records.verdict import Verdict


@dataclass(frozen=True)
class RoundRecord:
    """One round: what was asked, how it went, how all sets stand afterwards."""

    round_index: int
    """From 0; shown to people from 1."""
    num_forget_records: int
    num_retain_records: int
    holdout_loss_nats_per_token: float | None
    """The target of holdout_matched and of the stopping rule, measured once at the start of the job."""
    stop_reason: str
    num_steps: int
    num_products: int
    update_norm: float
    """`||w_end - w_start||` of the round."""
    wall_seconds: float
    steps: tuple[StepRecord, ...]
    before: dict[str, SetScores]
    after: dict[str, SetScores]
    """Keys `forget`, `retain`, `holdout`; `forget_round_<k>` of earlier rounds, `erased_before_<k>` of earlier jobs,
    k from 1."""
    verdict: Verdict
    tug_of_war: float | None = None
    exposure: Exposure | None = None
    """Attacks on the weights after the round. None: a record of a version that did not measure them."""
