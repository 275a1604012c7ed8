"""States of a request and every transition between them; whatever is not in `TRANSITIONS` is refused.

The public projection follows the Data Rights Protocol's words: a request is `expired` while it is unanswered after
its due date; it is worked on nevertheless. Outcomes are the words that California's Delete Act asks brokers to report.
"""

from dataclasses import dataclass
from enum import StrEnum

from distributed_unlearn.errors import RequestError


class RequestState(StrEnum):
    """Where a request stands."""

    RECEIVED = "received"
    """Written down; its cancellable delay runs."""
    SCHEDULED = "scheduled"
    """The delay is over: the next round takes it."""
    IN_ROUND = "in_round"
    ERASED = "erased"
    DENIED = "denied"
    CANCELLED = "cancelled"
    """Withdrawn by the operator."""
    REVOKED = "revoked"
    """Withdrawn by the subject."""


class Reason(StrEnum):
    """Why a request moved. Words of a list, never free text, which might hold what is to be erased."""

    DELAY_OVER = "delay_over"
    ROUND_STARTED = "round_started"
    ROUND_COMMITTED = "round_committed"
    ALREADY_ERASED = "already_erased"
    GATE_FAILED = "gate_failed"
    INTERRUPTED = "interrupted"
    """The round's driver ended before its commit."""
    UNKNOWN_ID = "unknown_id"
    NOT_IN_TRAINING_DATA = "not_in_training_data"
    """The id is known, and none of its records was ever trained on."""
    EXEMPT = "exempt"
    """The operator may or must keep the records (a legal duty, a claim)."""
    MISTAKEN = "mistaken"
    WITHDRAWN = "withdrawn"


class PublicStatus(StrEnum):
    """What the subject is told."""

    OPEN = "open"
    IN_PROGRESS = "in_progress"
    FULFILLED = "fulfilled"
    DENIED = "denied"
    EXPIRED = "expired"


class Outcome(StrEnum):
    """How a request ended, in the words that a regulator counts."""

    DELETED = "deleted"
    EXEMPTED = "exempted"
    NOT_FOUND = "not_found"


class TransitionError(RequestError):
    """A move that the table of transitions does not hold."""


@dataclass(frozen=True)
class Transition:
    """One permitted move, and the reasons that permit it."""

    source: RequestState
    target: RequestState
    reasons: frozenset[Reason]


def _move(source: RequestState, target: RequestState, *reasons: Reason) -> Transition:
    return Transition(source, target, frozenset(reasons))


_R, _W = RequestState, Reason
TRANSITIONS: tuple[Transition, ...] = (
    _move(_R.RECEIVED, _R.SCHEDULED, _W.DELAY_OVER),
    _move(_R.RECEIVED, _R.CANCELLED, _W.EXEMPT, _W.MISTAKEN),
    _move(_R.RECEIVED, _R.REVOKED, _W.WITHDRAWN),
    _move(_R.SCHEDULED, _R.IN_ROUND, _W.ROUND_STARTED),
    _move(_R.SCHEDULED, _R.ERASED, _W.ALREADY_ERASED),
    _move(_R.SCHEDULED, _R.DENIED, _W.UNKNOWN_ID, _W.NOT_IN_TRAINING_DATA),
    _move(_R.SCHEDULED, _R.CANCELLED, _W.EXEMPT, _W.MISTAKEN),
    _move(_R.SCHEDULED, _R.REVOKED, _W.WITHDRAWN),
    _move(_R.IN_ROUND, _R.ERASED, _W.ROUND_COMMITTED),
    _move(_R.IN_ROUND, _R.SCHEDULED, _W.GATE_FAILED, _W.INTERRUPTED),
)
"""All of them; the states that are no source are final."""

FINAL_STATES = frozenset(RequestState) - {transition.source for transition in TRANSITIONS}


def permitted(source: RequestState, target: RequestState, reason: Reason) -> bool:
    """Whether the table holds this move."""
    return any(t.source == source and t.target == target and reason in t.reasons for t in TRANSITIONS)


def require_permitted(number: int, source: RequestState, target: RequestState, reason: Reason) -> None:
    """Refuse a move that the table does not hold.

    Raises:
        TransitionError: naming the moves that are possible from where the request stands.
    """
    if permitted(source, target, reason):
        return
    possible = sorted({t.target.value for t in TRANSITIONS if t.source == source})
    raise TransitionError(
        f"request {number}, which is {source.value}, to become {target.value} ({reason.value})",
        f"one of {', '.join(possible)}" if possible else f"no further move: {source.value} is final",
        "see `request show`; a round that has begun cannot be left" if source == _R.IN_ROUND else "see `request show`",
    )


def public_status(state: RequestState, overdue: bool) -> PublicStatus:
    """What the subject is told of a request in `state`."""
    if state == RequestState.ERASED:
        return PublicStatus.FULFILLED
    if state in FINAL_STATES:
        return PublicStatus.DENIED
    if overdue:
        return PublicStatus.EXPIRED
    return PublicStatus.IN_PROGRESS if state == RequestState.IN_ROUND else PublicStatus.OPEN


def outcome_of(state: RequestState, reason: Reason | None) -> Outcome | None:
    """How a request ended; None while it is open, and where it was withdrawn or a mistake."""
    if state == RequestState.ERASED:
        return Outcome.DELETED
    if state == RequestState.DENIED:
        return Outcome.NOT_FOUND
    return Outcome.EXEMPTED if state == RequestState.CANCELLED and reason == Reason.EXEMPT else None
