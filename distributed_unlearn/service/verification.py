"""Re-hashes a ledger: the chain of its audit trail, the signed heads, its tables against a replay, files on disk.

The trail is the truth; the tables are what it led to. So a row that was changed by hand shows as a difference to the
replay, an entry that was changed as a broken hash, and a trail that was cut as a signed or noted head that is gone.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key
from sqlalchemy import Connection, Row, select

from distributed_unlearn.service.canonical import sha256
from distributed_unlearn.service.heads import Head
from distributed_unlearn.service.keys import signature_holds
from distributed_unlearn.service.ledger import GENESIS, Ledger, entry_hash, name_hash
from distributed_unlearn.service.replay import Replay, ReplayError
from distributed_unlearn.service.requests import AUDITED_COLUMNS, digest_of
from distributed_unlearn.service.tables import AUDIT, CERTIFICATES, ERASED, LEDGER, NAMES, REQUESTS, ROUNDS, SIGNATURES

_REQUEST_COLUMNS = (*AUDITED_COLUMNS, "state", "reason", "round_id")


@dataclass(frozen=True)
class Verification:
    """What was looked at, and the first thing that is broken."""

    num_entries: int
    num_signed_heads: int
    num_files: int
    last_signed: int | None
    """Entry up to which the trail is signed by one of the given keys; None without keys or signatures."""
    broken: str | None
    """The first broken entry, in words; None where everything holds."""


class _BrokenError(Exception):
    """Carries the sentence that names what is broken."""


def verify_ledger(
    ledger: Ledger, root: Path | None, keys: Sequence[Key], expected_head: tuple[int, str] | None = None
) -> Verification:
    """Verify everything, in the order: chain, heads, tables, files.

    Args:
        ledger: The ledger; it is only read.
        root: The service's folder, whose records and checkpoints are hashed; None leaves the files out.
        keys: The operator's public keys; none leaves the signatures out.
        expected_head: Number and hash of an entry that somebody kept, e.g. on a certificate.
    """
    counts = {"entries": 0, "heads": 0, "files": 0, "signed": 0}
    broken = None
    with ledger.read() as connection:
        try:
            replay = _verify_chain(connection, counts, expected_head)
            _verify_heads(connection, keys, counts)
            _verify_tables(connection, replay)
            _verify_ids(connection)
            if root is not None:
                _verify_files(connection, root, counts)
        except _BrokenError as error:
            broken = str(error)
    signed = counts["signed"] or None
    return Verification(counts["entries"], counts["heads"], counts["files"], signed, broken)


def _verify_chain(connection: Connection, counts: dict[str, int], expected: tuple[int, str] | None) -> Replay:
    replay, previous, seq = Replay(), GENESIS, 0
    for row in connection.execute(select(AUDIT).order_by(AUDIT.c.seq)):
        if row.seq != seq + 1:
            raise _BrokenError(f"audit entry {seq + 1} is missing")
        seq = row.seq
        if row.previous != previous:
            raise _BrokenError(f"audit entry {seq} does not follow entry {seq - 1}: its previous hash is another's")
        if row.hash != entry_hash(seq, row.at, row.event, row.body, row.previous):
            raise _BrokenError(f"audit entry {seq} ({row.event}) was changed: its hash is another's")
        if expected is not None and seq == expected[0] and row.hash != expected[1]:
            raise _BrokenError(f"audit entry {seq} is not the one that was noted: the trail was written anew")
        previous = row.hash
        try:
            replay.apply(row.event, json.loads(row.body))
        except (ReplayError, KeyError, ValueError) as error:
            raise _BrokenError(f"audit entry {seq} ({row.event}) cannot be: {error}") from None
    counts["entries"] = seq
    head = connection.execute(select(LEDGER)).one()
    if (head.head_seq, head.head_hash) != (seq, previous):
        raise _BrokenError(
            f"audit entry {max(seq, head.head_seq)}: the ledger's head is entry {head.head_seq}, not {seq}"
        )
    if expected is not None and seq < expected[0]:
        raise _BrokenError(f"audit entry {expected[0]}, which was noted, is gone: the trail was cut after {seq}")
    return replay


def _verify_heads(connection: Connection, keys: Sequence[Key], counts: dict[str, int]) -> None:
    ledger_id = connection.execute(select(LEDGER.c.ledger_id)).scalar_one()
    by_id, others = {key.keyid: key for key in keys}, 0
    query = select(SIGNATURES, AUDIT.c.hash).join(AUDIT, AUDIT.c.seq == SIGNATURES.c.seq, isouter=True)
    for row in connection.execute(query.order_by(SIGNATURES.c.seq)):
        if row.hash is None:
            raise _BrokenError(f"audit entry {row.seq}, which was signed, is gone")
        key = by_id.get(row.key_id)
        if key is None:
            others = row.seq
            continue
        if not signature_holds(key, Head(ledger_id, row.seq, row.hash).text, row.signature):
            raise _BrokenError(f"audit entry {row.seq}: the signature of the head there does not hold")
        counts["heads"] += 1
        counts["signed"] = row.seq
    if keys and others and not counts["heads"]:
        raise _BrokenError(f"audit entry {others}: the heads are signed, and none of them by the given key(s)")


def _verify_ids(connection: Connection) -> None:
    """Ids that are not purged must be those whose hashes the trail knows: by them a round finds what it erases."""
    salt = connection.execute(select(LEDGER.c.salt)).scalar_one()
    for name in connection.execute(select(NAMES).where(NAMES.c.name.is_not(None)).order_by(NAMES.c.request_id)):
        if name_hash(salt, name.kind, name.name) != name.name_hash:
            raise _BrokenError(f"request {name.request_id}: an id is not the one that was received")
    for row in connection.execute(select(ERASED).where(ERASED.c.record_id.is_not(None)).order_by(ERASED.c.round_id)):
        if name_hash(salt, "record", row.record_id) != row.record_hash:
            raise _BrokenError(f"round {row.round_id}: an erased record is not the one that was committed")
    for row in connection.execute(select(REQUESTS).where(REQUESTS.c.external_id.is_not(None)).order_by(REQUESTS.c.id)):
        if name_hash(salt, "external", row.external_id) != row.external_id_hash:
            raise _BrokenError(f"request {row.id}: its external id is not the one that was received")


def _verify_tables(connection: Connection, replay: Replay) -> None:
    for row in _rows(connection, REQUESTS):
        _compare(f"request {row.id}", row, replay.requests.pop(row.id, None), _REQUEST_COLUMNS)
    for number, digest in replay.names.items():
        query = select(NAMES.c.name_hash).where(NAMES.c.request_id == number)
        if digest_of(connection.execute(query).scalars()) != digest:
            raise _BrokenError(f"request {number}: its ids are not those that were received")
    for row in _rows(connection, ROUNDS):
        columns = ("state", "parent", "token", "folder", "record_sha256")
        _compare(f"round {row.id}", row, found := replay.rounds.pop(row.id, None), columns)
        files = None if row.files_sha256 is None else sha256(row.files_sha256)
        if found is not None and files != found["files_sha256"]:
            raise _BrokenError(f"round {row.id}: its list of files is not the one that was committed")
        erased = select(ERASED.c.record_hash).where(ERASED.c.round_id == row.id)
        digest = digest_of(set(connection.execute(erased).scalars()))
        if found is not None and found["records_sha256"] not in (None, digest):
            raise _BrokenError(f"round {row.id}: its erased records are not those that were committed")
    for row in _rows(connection, CERTIFICATES):
        if replay.certificates.pop(row.request_id, None) != row.sha256:
            raise _BrokenError(f"request {row.request_id}: its certificate is not the one that was issued")
    gone = [*(f"request {n}" for n in replay.requests), *(f"round {n}" for n in replay.rounds)]
    gone += [f"the certificate of request {n}" for n in replay.certificates]
    if gone:
        raise _BrokenError(f"{gone[0]} is in the audit trail and not in the tables")
    current = connection.execute(select(LEDGER.c.current_round)).scalar_one()
    if current != replay.current_round:
        raise _BrokenError(f"the current round is {current}, and {replay.current_round} by the audit trail")


def _rows(connection: Connection, table: Any) -> Iterator[Row[Any]]:
    yield from connection.execute(select(table).order_by(table.primary_key.columns[0])).all()


def _compare(what: str, row: Row[Any], found: dict[str, Any] | None, columns: Sequence[str]) -> None:
    if found is None:
        raise _BrokenError(f"{what} is not in the audit trail")
    for column in columns:
        if getattr(row, column) != found[column]:
            raise _BrokenError(f"{what}: its {column} is not what the audit trail says")


def broken_state(ledger: Ledger, root: Path, number: int) -> str | None:
    """What is wrong with the files of a committed round, against the hashes of its commit; None: nothing."""
    with ledger.read() as connection:
        row = connection.execute(select(ROUNDS).where(ROUNDS.c.id == number)).one()
    try:
        _verify_state(row, root)
    except _BrokenError as error:
        return str(error)
    return None


def _verify_state(row: Row[Any], root: Path) -> int:
    """Hash the files of a state that is kept; returns how many."""
    if row.folder is None or row.files_sha256 is None:
        return 0
    files = json.loads(row.files_sha256)
    for name, digest in files.items():
        _compare_file(f"round {row.id}", root / row.folder / name, digest, f"{row.folder}/{name}")
    return len(files)


def _verify_files(connection: Connection, root: Path, counts: dict[str, int]) -> None:
    for row in _rows(connection, ROUNDS):
        counts["files"] += _verify_state(row, root)
    for row in _rows(connection, CERTIFICATES):
        _compare_file(f"request {row.request_id}", root / row.path, row.sha256, row.path)
        counts["files"] += 1


def _compare_file(what: str, path: Path, digest: str, shown: str) -> None:
    try:
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise _BrokenError(f"{what}: '{shown}' cannot be read ({error.strerror})") from None
    if found != digest:
        raise _BrokenError(f"{what}: '{shown}' was changed: its hash is another's")
