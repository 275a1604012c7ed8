"""A result whose papers are still to be written: what the next start needs to write them, whatever ended the run.

A checkpoint takes its place by one rename, its record, salt and report follow. What they will say is in
`.result.json` before the rename, which only the owner can read, as the salt; the file goes when all is written.
"""

from dataclasses import dataclass
from pathlib import Path

from distributed_unlearn.errors import DataError, ModelError
from distributed_unlearn.files import write_json, write_private, write_private_json
from distributed_unlearn.provenance import read_mark
from distributed_unlearn.records import RECORD_NAME, RunRecord, read_record, to_json
from distributed_unlearn.records.codec import from_json, read_json

PENDING_NAME = ".result.json"


@dataclass(frozen=True)
class PendingResult:
    """The papers of a checkpoint that is about to take its place."""

    job_sha256: str
    """Of the job that made it, see `state.job_hash`."""
    record: RunRecord
    salt: str | None

    def write(self, folder: Path) -> None:
        """Put it into the output folder, before the checkpoint takes its place."""
        write_private_json(folder / PENDING_NAME, to_json(self))


def write_record(folder: Path, record: RunRecord, salt: str | None) -> None:
    """Write record.salt, which only the owner can read, then record.json.

    The salt proves to its holder that a given id was erased; without it the record tells no ids. It comes first:
    a salt without a record is of no use, and a record without its salt proves nothing.
    """
    if salt is not None:
        write_private(folder / "record.salt", salt)
    write_json(folder / RECORD_NAME, to_json(record))


def pending_result(folder: Path) -> PendingResult | None:
    """What a run left to write; None where there is nothing, or it is not of the checkpoint in `folder`."""
    path = folder / PENDING_NAME
    if not path.exists():
        return None
    try:
        found = from_json(PendingResult, read_json(path, f"'{path}'", "remove it"), str(path))
        mark = read_mark(folder / "checkpoint")
    except (DataError, ModelError):
        return None
    return found if mark is not None and mark.result == found.record.result.id else None


def complete_result(folder: Path) -> PendingResult | None:
    """Write what papers are missing beside the checkpoint in a claimed `folder`; None where no run left any to write.

    The report is for the caller: it is drawn from the record.
    """
    found = pending_result(folder)
    if found is None:
        settle(folder)  # of a checkpoint that never took its place
    elif not _has_record(folder, found.record):
        write_record(folder, found.record, found.salt)
    return found


def _has_record(folder: Path, record: RunRecord) -> bool:
    """Whether the result's record is there; one of a training may have its scores by now."""
    try:
        return read_record(folder / RECORD_NAME).result == record.result
    except DataError:
        return False


def settle(folder: Path) -> None:
    """All is written: nothing is left for the next start."""
    (folder / PENDING_NAME).unlink(missing_ok=True)
