"""One look at a service: what is pending, what runs, when the next round is, how the last ones ended."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select

from distributed_unlearn.config.service import ServiceConfig
from distributed_unlearn.service.ledger import Ledger
from distributed_unlearn.service.requests import ErasureRequest, list_requests
from distributed_unlearn.service.rounds_book import RoundEntry, current_round, drift, list_rounds, open_round
from distributed_unlearn.service.schedule import cron_trigger, next_tick
from distributed_unlearn.service.states import FINAL_STATES
from distributed_unlearn.service.tables import LEASES, LEDGER, WEBHOOKS

NUM_LAST = 5
"""Rounds and answers that are shown."""


@dataclass(frozen=True)
class Overview:
    """A service at one moment."""

    at: datetime
    num_by_state: dict[str, int]
    oldest_open_seconds: float | None
    """Age of the oldest request without an answer; None without one."""
    overdue: tuple[int, ...]
    due_soon: tuple[int, ...]
    """Due within `requests.warn_days`, and not overdue."""
    holder: str | None
    """Who holds the lease, as far as the ledger knows."""
    open_round: RoundEntry | None
    current: RoundEntry | None
    last_rounds: tuple[RoundEntry, ...]
    last_answers: tuple[ErasureRequest, ...]
    next_tick: datetime | None
    drift_nats: float
    retraining_recommended: bool
    num_webhooks_waiting: int
    num_audit_entries: int


def waiting(ledger: Ledger) -> tuple[int, float | None]:
    """Requests without an answer, and the age of the oldest in seconds; None without one."""
    now, found = ledger.clock(), [r for r in list_requests(ledger) if r.state not in FINAL_STATES]
    return len(found), max(((now - request.received_at).total_seconds() for request in found), default=None)


def look(ledger: Ledger, config: ServiceConfig) -> Overview:
    """The service now; only reads.

    Raises:
        ConfigError: the schedule is unfit; LedgerError: the ledger does not answer.
    """
    now, requests = ledger.clock(), list_requests(ledger)
    waiting = [request for request in requests if request.state not in FINAL_STATES]
    answered = sorted((r for r in requests if r.state in FINAL_STATES), key=lambda r: (r.moved_at, r.number))
    soon = now + timedelta(days=config.requests.warn_days)
    with ledger.read() as connection:
        holder = connection.execute(select(LEASES.c.holder)).scalar_one_or_none()
        entries = int(connection.execute(select(LEDGER.c.head_seq)).scalar_one())
        undelivered = select(func.count()).select_from(WEBHOOKS).where(WEBHOOKS.c.next_at.is_not(None))
        webhooks = int(connection.execute(undelivered).scalar_one())
    used, budget = drift(ledger), config.gates.drift_nats
    return Overview(
        at=now,
        num_by_state=dict(Counter(request.state.value for request in requests)),
        oldest_open_seconds=max(((now - r.received_at).total_seconds() for r in waiting), default=None),
        overdue=tuple(request.number for request in waiting if request.overdue),
        due_soon=tuple(r.number for r in waiting if not r.overdue and r.due_at <= soon),
        holder=holder,
        open_round=open_round(ledger),
        current=current_round(ledger),
        last_rounds=tuple(list_rounds(ledger)[-NUM_LAST:]),
        last_answers=tuple(answered[-NUM_LAST:]),
        next_tick=next_tick(cron_trigger(config.schedule), now),
        drift_nats=used,
        retraining_recommended=budget is not None and used > budget,
        num_webhooks_waiting=webhooks,
        num_audit_entries=entries,
    )
