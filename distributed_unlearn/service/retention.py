"""What is kept, and for how long: ids until their time is over, states as long as they may know what was erased.

A purge is written into the ledger first and carried out afterwards; `sweep` removes what the ledger does not know
(any more), so that a crash in between leaves nothing behind for longer than until the next round.
"""

import re
import secrets
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import or_, select, update

from distributed_unlearn.config.service import RetentionConfig
from distributed_unlearn.service.canonical import parse_time, time_text
from distributed_unlearn.service.fault_points import fault_points
from distributed_unlearn.service.ledger import Lease, Ledger, Writing
from distributed_unlearn.service.rounds_book import RoundState
from distributed_unlearn.service.states import FINAL_STATES
from distributed_unlearn.service.tables import ERASED, NAMES, REQUESTS, ROUNDS, WEBHOOKS

STATES_FOLDER = "states"
_STATE, _REMOVED = re.compile(r"round-\d{4,}"), re.compile(r"\.removed-.*")


@dataclass(frozen=True)
class Purged:
    """What a purge removed."""

    requests: tuple[int, ...]
    states: tuple[int, ...]


def purge(ledger: Ledger, lease: Lease, policy: RetentionConfig, root: Path) -> Purged:
    """Purge what the policy no longer keeps: first in the ledger, with an audit entry each, then on disk."""
    with ledger.write(lease) as writing:
        requests = () if policy.ids_days is None else _purge_ids(writing, policy.ids_days)
        states = _purge_states(writing, policy)
    sweep(ledger, lease, root)
    return Purged(requests, states)


def _purge_ids(writing: Writing, days: int) -> tuple[int, ...]:
    last = time_text(writing.now - timedelta(days=days))
    still_named = or_(
        REQUESTS.c.external_id.is_not(None),
        select(NAMES.c.name).where(NAMES.c.request_id == REQUESTS.c.id, NAMES.c.name.is_not(None)).exists(),
    )
    query = select(REQUESTS.c.id).where(
        REQUESTS.c.state.in_([state.value for state in FINAL_STATES]), REQUESTS.c.moved_at <= last, still_named
    )
    numbers = tuple(writing.connection.execute(query.order_by(REQUESTS.c.id)).scalars())
    if not numbers:
        return ()
    for table, column, key in (
        (NAMES, "name", NAMES.c.request_id),
        (ERASED, "record_id", ERASED.c.request_id),
        (REQUESTS, "external_id", REQUESTS.c.id),
    ):
        writing.connection.execute(update(table).where(key.in_(numbers)).values({column: None}))
    # A webhook that was never delivered by now holds the external id as well: it is given up.
    gone = update(WEBHOOKS).where(WEBHOOKS.c.request_id.in_(numbers))
    writing.connection.execute(gone.values(body="{}", next_at=None))
    writing.append("ids_purged", {"requests": list(numbers)})
    return numbers


def _purge_states(writing: Writing, policy: RetentionConfig) -> tuple[int, ...]:
    query = select(ROUNDS).where(ROUNDS.c.state == RoundState.COMMITTED.value).order_by(ROUNDS.c.id.desc())
    rounds = writing.connection.execute(query).all()
    purged = []
    for position, row in enumerate(rounds):
        if row.folder is None or row.id == writing.current_round:
            continue
        superseded = writing.now - parse_time(rounds[position - 1].ended_at)
        if position >= policy.keep_states or superseded >= timedelta(days=policy.superseded_days):
            writing.connection.execute(update(ROUNDS).where(ROUNDS.c.id == row.id).values(folder=None))
            writing.append("state_purged", {"round": row.id})
            purged.append(row.id)
    return tuple(purged)


def state_folder(number: int) -> str:
    """Where the round of this number writes, below the service's folder."""
    return f"{STATES_FOLDER}/round-{number:04d}"


def sweep(ledger: Ledger, lease: Lease, root: Path) -> list[str]:
    """Remove every folder of states that is neither kept nor the open round's; returns their names.

    Raises:
        LeaseError: another scheduler has taken over; nothing was removed. The folders are renamed in the transaction
            that says so: what the other one writes by now cannot be among them.
    """
    with ledger.write(lease) as writing:
        query = select(ROUNDS.c.folder).where(ROUNDS.c.folder.is_not(None))
        known = set(writing.connection.execute(query).scalars())
        running = select(ROUNDS.c.id).where(ROUNDS.c.state == RoundState.STARTED.value)
        known.update(state_folder(number) for number in writing.connection.execute(running).scalars())
        unknown = [path for path in _folders(root, _STATE) if f"{STATES_FOLDER}/{path.name}" not in known]
        for path in unknown:
            path.rename(path.with_name(f".removed-{path.name}-{secrets.token_hex(4)}"))
    for path in _folders(root, _REMOVED):
        with fault_points():
            shutil.rmtree(path)
    return [path.name for path in unknown]


def _folders(root: Path, pattern: re.Pattern[str]) -> list[Path]:
    states = root / STATES_FOLDER
    found = sorted(states.iterdir()) if states.is_dir() else []
    return [path for path in found if path.is_dir() and pattern.fullmatch(path.name)]
