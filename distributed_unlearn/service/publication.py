"""The `current` pointer: a link to the committed state's checkpoint, replaced in one step.

A reader opens `current` once and sees one state, whole; a state is never changed after its commit. The pointer follows
the ledger: it is set in a transaction that holds the lease, and set again at the start of every later round, so that a
crash between commit and publication is mended.
"""

import os
import secrets
from pathlib import Path

from distributed_unlearn.errors import LedgerError
from distributed_unlearn.service.fault_points import fault_points
from distributed_unlearn.service.ledger import Lease, Ledger
from distributed_unlearn.service.rounds_book import current_in

CURRENT = "current"


def publish(ledger: Ledger, lease: Lease, root: Path) -> Path | None:
    """Point `current` at the checkpoint of the ledger's current round; returns the pointer, None before the first.

    Raises:
        LeaseError: another scheduler has taken over; nothing was changed.
        LedgerError: the state that the ledger names is gone, or the pointer cannot be written.
    """
    pointer = root / CURRENT
    with ledger.write(lease) as writing:
        entry = current_in(writing.connection)
        if entry is None:
            return None
        target = Path(entry.folder or "") / "checkpoint"
        if entry.folder is None or not (root / target).is_dir():
            raise LedgerError(
                f"round {entry.number}, which is current, without its state below '{root}'",
                f"the folder {target}",
                "restore it from a backup; see docs/runbook.md",
            )
        if pointer.is_symlink() and os.readlink(pointer) == str(target):
            return pointer
        for left in root.glob(f".{CURRENT}-*"):
            left.unlink()  # of a process that was killed below
        fresh = root / f".{CURRENT}-{secrets.token_hex(4)}"
        try:
            with fault_points():
                fresh.symlink_to(target)
            with fault_points():
                os.replace(fresh, pointer)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise LedgerError(
                f"'{pointer}', which cannot be set ({error.strerror})", "a folder that can be written", "free the path"
            ) from error
    return pointer
