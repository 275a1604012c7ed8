"""Gates: whether a round may be committed, judged by its own record; and how much drift all rounds have used up."""

import math
from collections.abc import Mapping
from typing import get_args

from distributed_unlearn.config.service import GatesConfig
from distributed_unlearn.records import RunRecord, SetScores
from distributed_unlearn.records.verdict import UNKNOWN, Forgetting

_ENOUGH = {
    "forgotten": UNKNOWN,
    "partly forgotten": (*UNKNOWN, "partly forgotten"),
    "not required": get_args(Forgetting),
}


def failed_gates(gates: GatesConfig, record: RunRecord) -> list[str]:
    """A sentence of numbers for every gate that the round does not pass; empty where it may be committed."""
    last = record.rounds[-1]
    failed = [
        f"{name} is not finite" for name, value in _numbers(last.after, last.update_norm) if not math.isfinite(value)
    ]
    forget = last.verdict.forget
    if forget is None and gates.forgotten != "not required":
        failed.append("forgetting was not measured: the job has no holdout set")
    elif forget is not None and forget.outcome not in _ENOUGH[gates.forgotten]:
        failed.append(f"the records are {forget.outcome}; {gates.forgotten} is required")
    back = [item for item in last.verdict.earlier if item.outcome not in UNKNOWN]
    if gates.earlier_forgotten and back:
        failed.append(f"{len(back)} of {len(last.verdict.earlier)} earlier sets are {back[0].outcome}")
    rise, fall = retain_loss_rise(record), _memorised(last.before) - _memorised(last.after)
    if gates.retain_loss_nats is not None and not rise <= gates.retain_loss_nats:
        failed.append(f"the retain loss rose by {rise:.3f} nats per token; {gates.retain_loss_nats:g} at most")
    if gates.retain_memorisation is not None and not fall <= gates.retain_memorisation:
        failed.append(
            f"the share memorised of the retain set fell by {fall:.3f}; {gates.retain_memorisation:g} at most"
        )
    survival = record.surviving_update
    share = math.nan if survival is None else survival.projection
    if gates.surviving_share is not None and not share >= gates.surviving_share:
        failed.append(f"{share:.1%} of the update survives in the files; {gates.surviving_share:.1%} at least")
    return failed


def retain_loss_rise(record: RunRecord) -> float:
    """Rise of the retain loss in the round, nats per token."""
    last = record.rounds[-1]
    return last.after["retain"].loss_nats_per_token - last.before["retain"].loss_nats_per_token


def _memorised(scores: Mapping[str, SetScores]) -> float:
    return scores["retain"].exact_memorisation


def _numbers(after: Mapping[str, SetScores], update_norm: float) -> list[tuple[str, float]]:
    losses = [(f"the loss on {name.replace('_', ' ')}", item.loss_nats_per_token) for name, item in after.items()]
    return [*losses, ("the update's norm", update_norm)]
