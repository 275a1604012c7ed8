"""What the ledger knows of rounds: started, committed or rolled back; which state is current; what was erased.

The ledger decides: a round counts once `commit_round` has ended, whatever lies in folders, and never before. All of it
is written under the scheduler's lease.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from distributed_unlearn.errors import LedgerError
from distributed_unlearn.service.canonical import canonical_json, parse_time, sha256
from distributed_unlearn.service.ledger import Lease, Ledger, Writing
from distributed_unlearn.service.requests import digest_of, move
from distributed_unlearn.service.states import Reason, RequestState
from distributed_unlearn.service.tables import AUDIT, ERASED, LEDGER, REQUESTS, ROUNDS


class RoundState(StrEnum):
    """Where a round stands."""

    STARTED = "started"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True)
class RoundEntry:
    """A round as the ledger has it; numbers count attempts, so that a rolled back round keeps its own."""

    number: int
    state: RoundState
    parent: int | None
    started_at: datetime
    ended_at: datetime | None
    reason: str | None
    """Why it was rolled back."""
    folder: str | None
    """Below the service's folder; None while it runs, where it was rolled back, and once it was purged."""
    record_sha256: str | None
    files_sha256: str | None


@dataclass(frozen=True)
class StateFiles:
    """The folder of a finished round and the hashes of what is in it."""

    folder: str
    record_sha256: str
    files: Mapping[str, str]
    """Path below the folder -> SHA-256."""
    retain_loss_rise: float = 0.0
    """Nats per token, of this round."""


def schedule_ripe(ledger: Ledger, lease: Lease) -> list[int]:
    """Schedule every request whose delay is over; returns their numbers."""
    with ledger.write(lease) as writing:
        rows = writing.connection.execute(
            select(REQUESTS.c.id)
            .where(REQUESTS.c.state == RequestState.RECEIVED.value, REQUESTS.c.not_before <= writing.at)
            .order_by(REQUESTS.c.id)
        ).scalars()
        ripe = [int(number) for number in rows]
        for number in ripe:
            move(writing, number, RequestState.SCHEDULED, Reason.DELAY_OVER)
        return ripe


def deny(ledger: Ledger, lease: Lease, denied: Mapping[int, Reason], already: Mapping[int, int]) -> None:
    """Answer requests that need no round: those that name nothing that was trained on, and what is erased already.

    Args:
        ledger: The ledger.
        lease: The scheduler's.
        denied: Request -> why.
        already: Request -> the round that erased what it names.
    """
    with ledger.write(lease) as writing:
        for number, reason in denied.items():
            move(writing, number, RequestState.DENIED, reason)
        for number, round_number in already.items():
            move(writing, number, RequestState.ERASED, Reason.ALREADY_ERASED, round_number)


def start_round(ledger: Ledger, lease: Lease, requests: Sequence[int]) -> RoundEntry:
    """Begin a round for these requests, from the current state.

    Raises:
        RequestError: one of them was withdrawn meanwhile; nothing was written.
        LedgerError: a round is open already.
    """
    with ledger.write(lease) as writing:
        if _open(writing.connection) is not None:
            raise LedgerError("a round while another is open", "one round at a time", "end the open round first")
        number = int(writing.connection.execute(select(func.coalesce(func.max(ROUNDS.c.id), 0) + 1)).scalar_one())
        row = {
            "id": number,
            "state": RoundState.STARTED.value,
            "parent": writing.current_round,
            "token": lease.token,
            "started_at": writing.at,
        }
        writing.connection.execute(insert(ROUNDS).values(**row))
        body = {"round": number, "parent": writing.current_round, "token": lease.token, "requests": sorted(requests)}
        writing.append("round_started", body)
        for request in requests:
            move(writing, request, RequestState.IN_ROUND, Reason.ROUND_STARTED, number)
        return _entry(_round_row(writing.connection, number))


MAX_RESUMPTIONS = 5
"""Times that a round is gone on with: what fails again and again at the same step must not fail for ever."""


def resume_round(ledger: Ledger, lease: Lease, number: int) -> bool:
    """Note that the open round is gone on with; False where that has been tried `MAX_RESUMPTIONS` times."""
    with ledger.write(lease) as writing:
        _require_open(writing, number)
        query = select(AUDIT.c.body).where(AUDIT.c.event == "round_resumed")
        bodies = [json.loads(body) for body in writing.connection.execute(query).scalars()]
        if sum(body["round"] == number for body in bodies) >= MAX_RESUMPTIONS:
            return False
        writing.append("round_resumed", {"round": number, "token": lease.token})
        return True


def commit_round(
    ledger: Ledger, lease: Lease, number: int, state: StateFiles, erased: Mapping[int, Sequence[str]]
) -> RoundEntry:
    """Make a round's result the current state and its requests erased: the one moment in which a round counts.

    Args:
        ledger: The ledger.
        lease: The scheduler's.
        number: The open round.
        state: What it left, complete and flushed.
        erased: Request -> ids of the records that it names and that the round erased.

    Raises:
        LeaseError: another scheduler has taken over; nothing was written.
        LedgerError: the round is not the open one.
    """
    with ledger.write(lease) as writing:
        row = _require_open(writing, number)
        files = canonical_json(dict(state.files))
        _end(
            writing,
            number,
            state=RoundState.COMMITTED.value,
            folder=state.folder,
            record_sha256=state.record_sha256,
            files_sha256=files,
        )
        hashes = _write_erased(writing, number, erased)
        writing.connection.execute(update(LEDGER).values(current_round=number))
        body = {
            "round": number,
            "parent": row.parent,
            "folder": state.folder,
            "record_sha256": state.record_sha256,
            "files_sha256": sha256(files),
            "records_sha256": digest_of(hashes),
            "num_records": len(hashes),
            "retain_loss_rise": state.retain_loss_rise,
        }
        writing.append("round_committed", body)
        for request in _requests_in(writing.connection, number):
            move(writing, request, RequestState.ERASED, Reason.ROUND_COMMITTED, number)
        return _entry(_round_row(writing.connection, number))


def _write_erased(writing: Writing, number: int, erased: Mapping[int, Sequence[str]]) -> set[str]:
    rows = [
        {
            "request_id": request,
            "record_hash": writing.hash_name("record", record),
            "round_id": number,
            "record_id": record,
        }
        for request, records in erased.items()
        for record in records
    ]
    if rows:
        writing.connection.execute(insert(ERASED), rows)
    return {str(row["record_hash"]) for row in rows}


def roll_back(ledger: Ledger, lease: Lease, number: int, reason: Reason, text: str) -> None:
    """Give a round up: its parent stays current, its requests are scheduled again.

    Args:
        ledger: The ledger.
        lease: The scheduler's.
        number: The open round.
        reason: `GATE_FAILED` or `INTERRUPTED`.
        text: The gate's sentence, of numbers only.
    """
    with ledger.write(lease) as writing:
        _require_open(writing, number)
        _end(writing, number, state=RoundState.ROLLED_BACK.value, reason=text)
        writing.append("round_rolled_back", {"round": number, "reason": reason.value, "text": text})
        for request in _requests_in(writing.connection, number):
            move(writing, request, RequestState.SCHEDULED, reason)


def _end(writing: Writing, number: int, **values: str) -> None:
    writing.connection.execute(update(ROUNDS).where(ROUNDS.c.id == number).values(ended_at=writing.at, **values))


def _require_open(writing: Writing, number: int) -> Row[Any]:
    row = _open(writing.connection)
    if row is None or row.id != number:
        raise LedgerError(f"the end of round {number}, which is not open", "the open round", "see `status`")
    return row


def _open(connection: Connection) -> Row[Any] | None:
    return connection.execute(select(ROUNDS).where(ROUNDS.c.state == RoundState.STARTED.value)).one_or_none()


def _requests_in(connection: Connection, number: int) -> list[int]:
    query = select(REQUESTS.c.id).where(REQUESTS.c.round_id == number, REQUESTS.c.state == RequestState.IN_ROUND.value)
    return list(connection.execute(query.order_by(REQUESTS.c.id)).scalars())


def _round_row(connection: Connection, number: int) -> Row[Any]:
    return connection.execute(select(ROUNDS).where(ROUNDS.c.id == number)).one()


def open_round(ledger: Ledger) -> RoundEntry | None:
    """The round that was started and not ended, if there is one: it runs, or its driver died."""
    with ledger.read() as connection:
        row = _open(connection)
        return None if row is None else _entry(row)


def current_round(ledger: Ledger) -> RoundEntry | None:
    """The committed round whose state is current; None before the first."""
    with ledger.read() as connection:
        return current_in(connection)


def current_in(connection: Connection) -> RoundEntry | None:
    """`current_round`, inside a transaction."""
    number = connection.execute(select(LEDGER.c.current_round)).scalar_one()
    return None if number is None else _entry(_round_row(connection, number))


def erased_by(ledger: Ledger, request: int) -> int:
    """How many records a round erased for a request."""
    with ledger.read() as connection:
        query = select(func.count()).select_from(ERASED).where(ERASED.c.request_id == request)
        return int(connection.execute(query).scalar_one())


def drift(ledger: Ledger) -> float:
    """Rises of the retain loss over all committed rounds together, nats per token; a round that won some back is 0."""
    with ledger.read() as connection:
        bodies = connection.execute(select(AUDIT.c.body).where(AUDIT.c.event == "round_committed")).scalars()
        return float(sum(max(json.loads(body)["retain_loss_rise"], 0.0) for body in bodies))


def list_rounds(ledger: Ledger) -> list[RoundEntry]:
    """All rounds in their order."""
    with ledger.read() as connection:
        return [_entry(row) for row in connection.execute(select(ROUNDS).order_by(ROUNDS.c.id))]


def erased_in_rounds(ledger: Ledger) -> dict[str, int]:
    """Salted hash of every record that a committed round erased -> that round. Outlives the purge of the ids."""
    with ledger.read() as connection:
        rows = connection.execute(
            select(ERASED.c.record_hash, func.min(ERASED.c.round_id)).group_by(ERASED.c.record_hash)
        )
        return {str(digest): int(number) for digest, number in rows}


def _entry(row: Row[Any]) -> RoundEntry:
    return RoundEntry(
        number=row.id,
        state=RoundState(row.state),
        parent=row.parent,
        started_at=parse_time(row.started_at),
        ended_at=None if row.ended_at is None else parse_time(row.ended_at),
        reason=row.reason,
        folder=row.folder,
        record_sha256=row.record_sha256,
        files_sha256=row.files_sha256,
    )
