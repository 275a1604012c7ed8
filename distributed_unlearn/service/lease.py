"""The lease: at most one scheduler works, and one that was paused finds out before it writes.

Clocks decide only when a silent holder is given up. That they are wrong costs work that is done twice, never a wrong
entry: every acquisition raises the token, and every write under an older token is refused (`ledger.require_held`).
"""

import contextlib
import os
import platform
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, insert, select, update

from distributed_unlearn.errors import LeaseError, LedgerError
from distributed_unlearn.files import process_runs
from distributed_unlearn.service.canonical import parse_time
from distributed_unlearn.service.ledger import Lease, Ledger, require_held
from distributed_unlearn.service.tables import LEASES

SCHEDULER = "scheduler"


def this_process() -> str:
    """A name for this process that no other has: machine, process id, and a random part."""
    return f"{platform.node()}/{os.getpid()}/{secrets.token_hex(4)}"


def acquire(ledger: Ledger, holder: str, seconds: int) -> Lease:
    """Take the lease if nobody holds it: it was released, it ran out, or its process on this machine is gone.

    Args:
        ledger: The ledger.
        holder: See `this_process`.
        seconds: How long the holder may stay silent.

    Raises:
        LeaseError: another holds it.
    """
    with ledger.write() as writing:
        row = writing.connection.execute(select(LEASES).where(LEASES.c.name == SCHEDULER)).one_or_none()
        if row is not None and _is_live(row, writing.now):
            raise LeaseError(
                f"the lease held by '{row.holder}' since {row.renewed_at}",
                "one scheduler at a time",
                f"wait for its end; a holder that is silent for {row.seconds} s is given up",
            )
        token = 1 if row is None else row.token + 1
        values = {"token": token, "holder": holder, "renewed_at": writing.at, "seconds": seconds}
        if row is None:
            writing.connection.execute(insert(LEASES).values(name=SCHEDULER, **values))
        else:
            writing.connection.execute(update(LEASES).where(LEASES.c.name == SCHEDULER).values(**values))
        writing.append("lease_acquired", {"holder": holder, "token": token})
        return Lease(SCHEDULER, holder, token)


def _is_live(row: Row[Any], now: datetime) -> bool:
    if row.holder is None:
        return False
    machine, process, _ = row.holder.split("/")
    if machine == platform.node() and process.isdigit() and not process_runs(int(process)):
        return False
    length, renewed = timedelta(seconds=row.seconds), parse_time(row.renewed_at)
    # The second condition: a clock that went back by more than a lease must not keep a dead holder alive for ever.
    return renewed - length <= now < renewed + length


def renew(ledger: Ledger, lease: Lease) -> None:
    """Say that the holder lives.

    Raises:
        LeaseError: another has taken over.
    """
    with ledger.write(lease) as writing:
        writing.connection.execute(update(LEASES).where(LEASES.c.name == lease.name).values(renewed_at=writing.at))


def release(ledger: Ledger, lease: Lease) -> None:
    """Give the lease back, if it is still this one."""
    with ledger.write() as writing:
        try:
            require_held(writing.connection, lease)
        except LeaseError:
            return
        writing.connection.execute(update(LEASES).where(LEASES.c.name == lease.name).values(holder=None))


class HeldLease:
    """A lease that a thread renews; `require` raises once it is lost."""

    def __init__(self, ledger: Ledger, lease: Lease, seconds: int) -> None:
        self.lease = lease
        self._ledger, self._every = ledger, seconds / 3
        self._stop = threading.Event()
        self._lost: LeaseError | None = None
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def _renew(self) -> None:
        while not self._stop.wait(self._every):
            try:
                renew(self._ledger, self.lease)
            except LeaseError as error:
                self._lost = error
                return
            except LedgerError:
                continue  # the database may come back before the lease runs out; writes find out by themselves

    def require(self) -> None:
        """Nothing while the lease is held, as far as is known.

        Raises:
            LeaseError: another has taken over; whatever is computed from here on could not be written.
        """
        if self._lost is not None:
            raise self._lost

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """End to renew, and wait for the thread."""
        self._stop.set()
        self._thread.join()


@contextmanager
def held(ledger: Ledger, seconds: int, holder: str | None = None) -> Iterator[HeldLease]:
    """The lease for the length of the block, renewed by a thread.

    Raises:
        LeaseError: another holds it.
    """
    lease = acquire(ledger, holder or this_process(), seconds)
    keeper = HeldLease(ledger, lease, seconds)
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.stop()
        with contextlib.suppress(LedgerError):  # what was done is done; the lease runs out by itself
            release(ledger, lease)
