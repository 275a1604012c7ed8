"""Erasure requests: taken in, looked at, withdrawn. Ids and dates only; the text of a record never comes near.

What is asked is a list of ids of records, of subjects, or both. A request is idempotent by `external_id`; one whose ids
an earlier request names already is taken in as well and linked to it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, Row, func, insert, select, update

from distributed_unlearn.config.service import RequestsConfig
from distributed_unlearn.errors import RequestError
from distributed_unlearn.service.canonical import canonical_json, parse_time, sha256, time_text
from distributed_unlearn.service.ledger import Ledger, Writing, name_hash
from distributed_unlearn.service.states import (
    FINAL_STATES,
    Outcome,
    PublicStatus,
    Reason,
    RequestState,
    outcome_of,
    public_status,
    require_permitted,
)
from distributed_unlearn.service.tables import NAMES, REQUESTS, WEBHOOKS

DuePolicy = Literal["default", "california"]
Kind = Literal["subject", "record"]
MAX_ID_LENGTH, MAX_IDS, MAX_EXTERNAL_ID_LENGTH = 500, 100_000, 200


@dataclass(frozen=True)
class NewRequest:
    """What a requester hands over."""

    subjects: tuple[str, ...] = ()
    record_ids: tuple[str, ...] = ()
    external_id: str | None = None
    policy: DuePolicy = "default"
    due: datetime | None = None
    """Sooner or later than the policy's date."""

    def __post_init__(self) -> None:
        """Refuse what no request can be.

        Raises:
            RequestError: no ids, too many, or malformed ones. Without the id: what is wrong with it is all one needs.
        """
        if not 1 <= len(self.names) <= MAX_IDS:
            raise RequestError(
                f"a request with {len(self.names)} ids",
                f"1 to {MAX_IDS}",
                "split it into several requests" if self.names else "name subjects or record ids",
            )
        for position, (kind, name) in enumerate(self.names):
            _require_plain(f"the {kind} id number {position + 1}", name, MAX_ID_LENGTH)
        if self.external_id is not None:
            _require_plain("an external id", self.external_id, MAX_EXTERNAL_ID_LENGTH)

    @property
    def names(self) -> tuple[tuple[Kind, str], ...]:
        """The ids asked for with their kinds, each once."""
        subjects: list[tuple[Kind, str]] = [("subject", name) for name in dict.fromkeys(self.subjects)]
        return (*subjects, *(("record", name) for name in dict.fromkeys(self.record_ids)))


@dataclass(frozen=True)
class ErasureRequest:
    """A request as the ledger has it."""

    number: int
    state: RequestState
    reason: Reason | None
    status: PublicStatus
    outcome: Outcome | None
    external_id: str | None
    policy: str
    received_at: datetime
    not_before: datetime
    due_at: datetime
    moved_at: datetime
    overdue: bool
    duplicate_of: int | None
    round_number: int | None
    num_ids: int
    subjects: tuple[str, ...]
    """Empty once they were purged; as is `record_ids`."""
    record_ids: tuple[str, ...]

    def outcome_message(self) -> dict[str, Any]:
        """What a webhook tells: how the request stands, no ids but the sender's own."""
        return {
            "request": self.number,
            "external_id": self.external_id,
            "status": self.status,
            "outcome": self.outcome,
            "reason": self.reason,
            "round": self.round_number,
            "at": time_text(self.moved_at),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data; times as ISO 8601 in UTC."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {key: time_text(value) if isinstance(value, datetime) else value for key, value in plain.items()}


class UnknownRequestError(RequestError):
    """No request has this number."""


class ConflictError(RequestError):
    """An external id that names another request already."""


def add_request(ledger: Ledger, new: NewRequest, policy: RequestsConfig, webhook: bool = False) -> ErasureRequest:
    """Take a request in; the same `external_id` with the same ids again changes nothing and returns the first one.

    Args:
        ledger: The ledger.
        new: What is asked.
        policy: Due dates and delay.
        webhook: Whether the sender is told of the outcome by webhook.

    Raises:
        RequestError: a due date in the past.
        ConflictError: a known `external_id` with other ids.
    """
    with ledger.write() as writing:
        hashes = {writing.hash_name(kind, name): (kind, name) for kind, name in new.names}
        external = None if new.external_id is None else writing.hash_name("external", new.external_id)
        known = _find_external(writing.connection, external)
        if known is not None:
            if _hashes_of(writing.connection, known) != hashes.keys():
                raise ConflictError(
                    "an external id that the ledger knows, with other ids than then",
                    "the same request again, or a new external id",
                    f"see request {known}, or give the new request an external id of its own",
                )
            return _load(writing.connection, known, writing.now)
        due = writing.now + timedelta(days=_days(policy, new.policy)) if new.due is None else _in_utc(new.due)
        if due <= writing.now:
            raise RequestError("a due date in the past", "one that is still to come", "correct the due date")
        number = int(writing.connection.execute(select(func.coalesce(func.max(REQUESTS.c.id), 0) + 1)).scalar_one())
        row = {
            "id": number,
            "external_id": new.external_id,
            "external_id_hash": external,
            "state": RequestState.RECEIVED.value,
            "policy": new.policy,
            "received_at": writing.at,
            "not_before": time_text(writing.now + timedelta(hours=policy.delay_hours)),
            "due_at": time_text(due),
            "moved_at": writing.at,
            "duplicate_of": _find_duplicate(writing.connection, hashes.keys()),
            "warned": False,
        }
        writing.connection.execute(insert(REQUESTS).values(**row))
        writing.connection.execute(
            insert(NAMES),
            [{"request_id": number, "name_hash": h, "kind": kind, "name": n} for h, (kind, n) in hashes.items()],
        )
        if webhook:
            _expect_outcome(writing, number)
        audited = {key: row[key] for key in AUDITED_COLUMNS}
        writing.append("request_received", {"request": number, **audited, "names_sha256": digest_of(hashes)})
        return _load(writing.connection, number, writing.now)


AUDITED_COLUMNS = ("external_id_hash", "policy", "received_at", "not_before", "due_at", "duplicate_of")
"""Columns of a request that never change and are part of its first audit entry."""


def digest_of(hashes: Iterable[str]) -> str:
    """One hash for a set of hashes, whatever their order."""
    return sha256(canonical_json(sorted(hashes)))


def _expect_outcome(writing: Writing, number: int) -> None:
    row = {"request_id": number, "body": "", "attempts": 0, "next_at": None, "delivered": False}
    writing.connection.execute(insert(WEBHOOKS).values(row))


def _days(config: RequestsConfig, policy: DuePolicy) -> int:
    return config.due_days_california if policy == "california" else config.due_days


def _in_utc(due: datetime) -> datetime:
    try:
        return due.astimezone(UTC)
    except OverflowError:
        raise RequestError("a due date beyond the calendar", "a year from 1 to 9999", "correct the due date") from None


def _require_plain(what: str, name: str, longest: int) -> None:
    if not name or name != name.strip() or len(name) > longest or not name.isprintable():
        raise RequestError(
            f"{what}, which is empty, longer than {longest} characters, or has control characters or blanks around it",
            f"1 to {longest} printable characters",
            "correct the id; a file of ids has one a line",
        )


def _find_external(connection: Connection, external: str | None) -> int | None:
    if external is None:
        return None
    query = select(REQUESTS.c.id).where(REQUESTS.c.external_id_hash == external)
    return connection.execute(query).scalar_one_or_none()


def _hashes_of(connection: Connection, number: int) -> set[str]:
    return set(connection.execute(select(NAMES.c.name_hash).where(NAMES.c.request_id == number)).scalars())


def _find_duplicate(connection: Connection, hashes: Iterable[str]) -> int | None:
    """The first request that names all of these ids and was not withdrawn or denied."""
    wanted = set(hashes)
    live = [RequestState.ERASED.value, *(s.value for s in RequestState if s not in FINAL_STATES)]
    candidates = connection.execute(
        select(NAMES.c.request_id)
        .join(REQUESTS, REQUESTS.c.id == NAMES.c.request_id)
        .where(NAMES.c.name_hash == min(wanted), REQUESTS.c.state.in_(live))
        .order_by(NAMES.c.request_id)
    ).scalars()
    return next((number for number in list(candidates) if wanted <= _hashes_of(connection, number)), None)


def get_request(ledger: Ledger, number: int) -> ErasureRequest:
    """The request of this number.

    Raises:
        RequestError: there is none.
    """
    with ledger.read() as connection:
        return _load(connection, number, ledger.clock())


def find_request(ledger: Ledger, external_id: str) -> ErasureRequest | None:
    """The request of an external id, which outlives the purge of the external id itself; None if there is none."""
    digest = name_hash(ledger.salt(), "external", external_id)
    with ledger.read() as connection:
        number = _find_external(connection, digest)
        return None if number is None else _load(connection, number, ledger.clock())


def list_requests(ledger: Ledger, states: Sequence[RequestState] = ()) -> list[ErasureRequest]:
    """All requests in their order, or those in one of `states`."""
    query = select(REQUESTS).order_by(REQUESTS.c.id)
    if states:
        query = query.where(REQUESTS.c.state.in_([state.value for state in states]))
    with ledger.read() as connection:
        names: dict[int, list[Row[Any]]] = {}
        for name in connection.execute(select(NAMES).order_by(NAMES.c.request_id, NAMES.c.name)):
            names.setdefault(name.request_id, []).append(name)
        now = ledger.clock()
        return [_request(row, names.get(row.id, []), now) for row in connection.execute(query)]


def withdraw(ledger: Ledger, number: int, reason: Reason, target: RequestState) -> ErasureRequest:
    """Cancel (the operator: `EXEMPT` or `MISTAKEN`) or revoke (the subject: `WITHDRAWN`) a request.

    Raises:
        RequestError: no such request, or one that has gone too far.
    """
    with ledger.write() as writing:
        move(writing, number, target, reason)
        return _load(writing.connection, number, writing.now)


def move(writing: Writing, number: int, target: RequestState, reason: Reason, round_number: int | None = None) -> None:
    """Move a request inside a transaction that writes, with its audit entry.

    Args:
        writing: The transaction.
        number: The request.
        target: Where to.
        reason: Why.
        round_number: The round that it enters, or by which it was erased.

    Raises:
        RequestError: the table of transitions does not hold this move, or there is no such request.
    """
    source = RequestState(_row(writing.connection, number).state)
    require_permitted(number, source, target, reason)
    values = {"state": target.value, "reason": reason.value, "moved_at": writing.at, "round_id": round_number}
    writing.connection.execute(update(REQUESTS).where(REQUESTS.c.id == number).values(**values))
    body = {"request": number, "from": source.value, "to": target.value, "reason": reason.value, "round": round_number}
    writing.append("request_moved", body)
    if target in FINAL_STATES:
        message = canonical_json(_load(writing.connection, number, writing.now).outcome_message())
        waiting = (WEBHOOKS.c.request_id == number) & (WEBHOOKS.c.body == "")
        writing.connection.execute(update(WEBHOOKS).where(waiting).values(body=message, next_at=writing.at))


def _row(connection: Connection, number: int) -> Row[Any]:
    # A number that no database column holds must not become the database's own complaint.
    row = None
    if 0 < number < 2**31:
        row = connection.execute(select(REQUESTS).where(REQUESTS.c.id == number)).one_or_none()
    if row is None:
        raise UnknownRequestError(f"request {number}, which does not exist", "a request's number", "see `request list`")
    return row


def _load(connection: Connection, number: int, now: datetime) -> ErasureRequest:
    row = _row(connection, number)
    names = connection.execute(select(NAMES).where(NAMES.c.request_id == number).order_by(NAMES.c.name)).all()
    return _request(row, names, now)


def _request(row: Row[Any], names: Sequence[Row[Any]], now: datetime) -> ErasureRequest:
    state, reason = RequestState(row.state), None if row.reason is None else Reason(row.reason)
    due = parse_time(row.due_at)
    overdue = state not in FINAL_STATES and now > due
    return ErasureRequest(
        number=row.id,
        state=state,
        reason=reason,
        status=public_status(state, overdue),
        outcome=outcome_of(state, reason),
        external_id=row.external_id,
        policy=row.policy,
        received_at=parse_time(row.received_at),
        not_before=parse_time(row.not_before),
        due_at=due,
        moved_at=parse_time(row.moved_at),
        overdue=overdue,
        duplicate_of=row.duplicate_of,
        round_number=row.round_id,
        num_ids=len(names),
        subjects=tuple(n.name for n in names if n.kind == "subject" and n.name is not None),
        record_ids=tuple(n.name for n in names if n.kind == "record" and n.name is not None),
    )
