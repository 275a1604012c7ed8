"""From what requests name to records: what a round has to erase, and what can be answered without one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from distributed_unlearn.config import DataConfig, SelectionConfig
from distributed_unlearn.data.corpus import Identity, identities, open_table
from distributed_unlearn.data.selection import read_ids
from distributed_unlearn.service.ledger import name_hash
from distributed_unlearn.service.requests import ErasureRequest
from distributed_unlearn.service.states import Reason


@dataclass(frozen=True)
class Resolution:
    """What becomes of each request."""

    erase: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Request -> the ids of its records that the round is to erase."""
    denied: dict[int, Reason] = field(default_factory=dict)
    already: dict[int, int] = field(default_factory=dict)
    """Request -> the last of the rounds that erased all it names."""

    @property
    def record_ids(self) -> tuple[str, ...]:
        """All records to erase, each once, sorted."""
        return tuple(sorted({record for records in self.erase.values() for record in records}))


def read_identities(config: DataConfig) -> list[Identity]:
    """Ids of all records of the data, without their content.

    Raises:
        DataError: the data cannot be read.
    """
    with open_table(config) as table:
        identify = identities(config, table)
        return [identify(row, index) for index, row in enumerate(table)]


def held_out(identities: Iterable[Identity], holdout: SelectionConfig | None) -> set[str]:
    """Ids of the records of the data that the holdout selection names: they were never trained on."""
    if holdout is None:
        return set()
    ids, subjects = {*holdout.record_ids, *read_ids(holdout.ids_file)}, frozenset(holdout.subjects)
    return {item.record_id for item in identities if item.record_id in ids or item.subject_id in subjects}


def resolve(
    requests: Sequence[ErasureRequest],
    identities: Sequence[Identity],
    never_trained_on: set[str],
    erased: Mapping[str, int],
    salt: str,
) -> Resolution:
    """Find the records that each request names.

    A request that names some records which are there and some which are not erases those that are. What a round erased
    is recognised by its hash, whether or not the data still holds it.

    Args:
        requests: Scheduled ones, with their ids.
        identities: All records of the data.
        never_trained_on: Ids among them that are held out.
        erased: Salted hash of a record's id -> the round that erased it.
        salt: The ledger's.
    """
    of_subject: dict[str, list[str]] = {}
    for item in identities:
        if item.subject_id is not None:
            of_subject.setdefault(item.subject_id, []).append(item.record_id)
    known = {item.record_id for item in identities}
    found = Resolution()
    for request in requests:
        named = set(request.record_ids).union(*(of_subject.get(name, ()) for name in request.subjects))
        rounds = {record: erased.get(name_hash(salt, "record", record)) for record in named}
        gone = [number for number in rounds.values() if number is not None]
        to_erase = {r for r, number in rounds.items() if number is None and r in known and r not in never_trained_on}
        if to_erase:
            found.erase[request.number] = tuple(sorted(to_erase))
        elif gone:
            found.already[request.number] = max(gone)
        elif named & known:
            found.denied[request.number] = Reason.NOT_IN_TRAINING_DATA
        else:
            found.denied[request.number] = Reason.UNKNOWN_ID
    return found
