"""The ledger: every write is one transaction that appends to the audit trail, under the lease's token where it has one.

All writers lock the one row of `ledger` first, so that writes follow one another and the chain has no forks. Who writes
as the scheduler hands over its lease; the token is compared in the same transaction, so that a scheduler which was
paused while another took over writes nothing.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Row, insert, select, update

from distributed_unlearn.config.service import ServiceConfig
from distributed_unlearn.errors import ConfigError, LeaseError, LedgerError
from distributed_unlearn.provenance import hash_ids, new_salt
from distributed_unlearn.service.canonical import canonical_json, sha256, time_text, utc_now
from distributed_unlearn.service.database import connect, ledger_url, lock_for_making, migrate, shown, transaction
from distributed_unlearn.service.fault_points import fault_points
from distributed_unlearn.service.tables import AUDIT, LEASES, LEDGER

GENESIS = "0" * 64
"""What the first entry of a trail follows."""


@dataclass(frozen=True)
class Lease:
    """The right to write as the scheduler; `token` grows with every acquisition, by whomever."""

    name: str
    holder: str
    token: int


def entry_hash(seq: int, at: str, event: str, body: str, previous: str) -> str:
    """SHA-256 of an audit entry: of the canonical JSON list `[seq, at, event, body, previous]`, `body` as its text."""
    return sha256(canonical_json([seq, at, event, body, previous]))


class Writing:
    """A transaction that writes: its connection, its time, and the end of the audit trail."""

    def __init__(self, connection: Connection, ledger: Row[Any], now: datetime) -> None:
        self.connection, self.now, self.at = connection, now, time_text(now)
        self.current_round: int | None = ledger.current_round
        self._salt, self._seq, self._head = ledger.salt, ledger.head_seq, ledger.head_hash

    def append(self, event: str, body: dict[str, Any]) -> int:
        """Append an audit entry; returns its number. `body` holds hashes, never ids, which must stay purgeable."""
        text, seq = canonical_json(body), self._seq + 1
        digest = entry_hash(seq, self.at, event, text, self._head)
        row = {"seq": seq, "at": self.at, "event": event, "body": text, "previous": self._head, "hash": digest}
        self.connection.execute(insert(AUDIT).values(row))
        self.connection.execute(update(LEDGER).values(head_seq=seq, head_hash=digest))
        self._seq, self._head = seq, digest
        return seq

    def hash_name(self, kind: str, name: str) -> str:
        """Salted SHA-256 of an id of this kind (`subject`, `record`, `external`)."""
        return name_hash(self._salt, kind, name)


def name_hash(salt: str, kind: str, name: str) -> str:
    """SHA-256 of the ledger's salt, the kind of id and the id; see `provenance.hash_ids`."""
    return hash_ids([f"{kind}\0{name}"], salt)[0]


class Ledger:
    """An open ledger. Cheap: it holds no connection between its transactions, and may be shared by threads."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime]) -> None:
        self._engine, self.clock = engine, clock

    @property
    def shown_url(self) -> str:
        """The URL without its password."""
        return shown(self._engine.url)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads.

        Raises:
            LedgerError: the database cannot be used.
        """
        with transaction(self._engine, writes=False) as connection:
            yield connection

    @contextmanager
    def write(self, lease: Lease | None = None) -> Iterator[Writing]:
        """A transaction that writes: all of it at the end of the block, or nothing if the block raises.

        Raises:
            LeaseError: `lease` is not the one that the ledger knows as the last.
            LedgerError: the database cannot be used.
        """
        with fault_points(), transaction(self._engine, writes=True) as connection, fault_points():
            row = _locked_row(connection)
            if row is None:
                raise LedgerError(f"ledger '{self.shown_url}' without its first row", "a ledger", "restore a backup")
            if lease is not None:
                require_held(connection, lease)
            yield Writing(connection, row, self.clock())

    def salt(self) -> str:
        """The salt of every hash of an id in this ledger."""
        with self.read() as connection:
            return str(connection.execute(select(LEDGER.c.salt)).scalar_one())


def _locked_row(connection: Connection) -> Row[Any] | None:
    """The ledger's row, locked until the transaction ends; SQLite has locked the whole file already."""
    return connection.execute(select(LEDGER).with_for_update()).one_or_none()


def require_held(connection: Connection, lease: Lease) -> None:
    """Refuse to write under a lease that is not the last one, or was released.

    Raises:
        LeaseError: another scheduler has taken over.
    """
    row = connection.execute(select(LEASES).where(LEASES.c.name == lease.name)).one_or_none()
    if row is None or (row.token, row.holder) != (lease.token, lease.holder):
        raise LeaseError(
            f"a write under lease {lease.token} of '{lease.holder}', which is not the ledger's any more",
            "the lease that was acquired last",
            "nothing was written; start again: whoever holds the lease now goes on with the work",
        )


def open_ledger(url: str, create: bool = False, clock: Callable[[], datetime] = utc_now) -> Ledger:
    """Open the ledger at a URL or path, after bringing its tables up to date.

    Args:
        url: A path (SQLite) or a database URL.
        create: Whether a missing ledger is made.
        clock: Tells the time, in UTC.

    Raises:
        LedgerError: no ledger there, one of a newer program, or a database that cannot be used.
    """
    engine = connect(ledger_url(url), create)
    migrate(engine, create)
    with transaction(engine, writes=False) as connection:
        exists = connection.execute(select(LEDGER.c.id)).one_or_none() is not None
    if not exists:
        with transaction(engine, writes=True) as connection:
            lock_for_making(connection)
            if connection.execute(select(LEDGER.c.id)).one_or_none() is None:
                _begin_trail(connection, clock())
    return Ledger(engine, clock)


def service_ledger(config: ServiceConfig) -> Ledger:
    """The service's ledger, made together with the service's folder where there is none.

    Raises:
        ConfigError: a folder that cannot be made; LedgerError: a ledger that cannot be opened.
    """
    try:
        config.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"folder '{config.folder}', which cannot be made ({error.strerror})", "a folder", "choose another folder"
        ) from error
    return open_ledger(config.ledger_url, create=True)


def _begin_trail(connection: Connection, now: datetime) -> None:
    row = {"id": 1, "ledger_id": secrets.token_hex(16), "salt": new_salt(), "created_at": time_text(now)}
    connection.execute(insert(LEDGER).values(**row, head_seq=0, head_hash=GENESIS, current_round=None))
    begun = connection.execute(select(LEDGER)).one()
    Writing(connection, begun, now).append("ledger_created", {"ledger_id": row["ledger_id"], "format": 1})
