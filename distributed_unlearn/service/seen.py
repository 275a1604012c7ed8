"""Which records the data has held so far, as salted hashes: an id that was there and is gone is not unknown.

A request that names such an id cannot be answered: the model may know the record, and its text is needed to erase it.
The file belongs to the service's folder; without it (a first pass, a folder that was not restored) nothing was seen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distributed_unlearn.data.corpus import Identity
from distributed_unlearn.files import write_private
from distributed_unlearn.service.ledger import name_hash

SEEN_NAME = "seen.hashes"
HASH_LENGTH = 16
"""Hexadecimal digits of a hash: of a million records two are taken for one another with a chance of 3e-8."""
_NONE = "-"


def short_hash(salt: str, kind: str, name: str) -> str:
    """The beginning of the ledger's hash of an id."""
    return name_hash(salt, kind, name)[:HASH_LENGTH]


@dataclass(frozen=True)
class Seen:
    """Records by the short hashes of their ids and subjects."""

    subject_of: Mapping[str, str] = field(default_factory=dict)
    """Record -> subject, or `-`."""

    def named_by(self, record_ids: Iterable[str], subjects: Iterable[str], salt: str) -> set[str]:
        """The records, by hash, that were seen and that a request names."""
        records = {short_hash(salt, "record", name) for name in record_ids} & self.subject_of.keys()
        wanted = {short_hash(salt, "subject", name) for name in subjects}
        return records | ({r for r, subject in self.subject_of.items() if subject in wanted} if wanted else set())


def look_again(root: Path, salt: str, identities: Iterable[Identity]) -> Seen:
    """What was seen before and is there now; the file is brought up to date."""
    path = root / SEEN_NAME
    before = {}
    if path.exists():
        before = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
    now = {
        short_hash(salt, "record", item.record_id): (
            _NONE if item.subject_id is None else short_hash(salt, "subject", item.subject_id)
        )
        for item in identities
    }
    found = {**before, **now}
    if found != before:
        write_private(path, "\n".join(f"{record} {subject}" for record, subject in sorted(found.items())))
    return Seen(found)
