"""From what requests name to records: what a round has to erase, and what can be answered without one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from distributed_unlearn.config import DataConfig, ModelConfig, SelectionConfig
from distributed_unlearn.data.corpus import Identity, identities, open_table
from distributed_unlearn.data.selection import read_ids
from distributed_unlearn.data.sources import Named, source_for
from distributed_unlearn.models.checkpoint import load_model_config
from distributed_unlearn.service.ledger import name_hash
from distributed_unlearn.service.requests import ErasureRequest
from distributed_unlearn.service.seen import HASH_LENGTH, Seen, short_hash
from distributed_unlearn.service.states import Reason


@dataclass(frozen=True)
class Resolution:
    """What becomes of each request."""

    erase: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Request -> the ids of its records that the round is to erase."""
    denied: dict[int, Reason] = field(default_factory=dict)
    already: dict[int, int] = field(default_factory=dict)
    """Request -> the last of the rounds that erased all it names."""
    missing: tuple[int, ...] = ()
    """Requests that name records which the data held at an earlier pass and holds no longer: not answered."""

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


def dropped(model: ModelConfig, data: DataConfig) -> set[str]:
    """Ids of the records that `data.too_long: drop` leaves out: a training by these settings never saw them.

    Raises:
        ModelError, DataError: model or data cannot be read.
    """
    if data.too_long != "drop":
        return set()
    nothing = Named(frozenset(), frozenset(), frozenset())
    return {
        record.record_id
        for record in source_for(model, load_model_config(model), data).load(data, None, nothing).dropped
    }


def resolve(
    requests: Sequence[ErasureRequest],
    identities: Sequence[Identity],
    never_trained_on: set[str],
    erased: Mapping[str, int],
    salt: str,
    seen: Seen,
) -> Resolution:
    """Find the records that each request names.

    A request that names some records which are there and some which are not erases those that are. What a round erased
    is recognised by its hash, whether or not the data still holds it.

    Args:
        requests: Scheduled ones, with their ids.
        identities: All records of the data.
        never_trained_on: Ids among them that are held out or dropped.
        erased: Salted hash of a record's id -> the round that erased it.
        salt: The ledger's.
        seen: What the data has held so far.
    """
    of_subject: dict[str, list[str]] = {}
    for item in identities:
        if item.subject_id is not None:
            of_subject.setdefault(item.subject_id, []).append(item.record_id)
    known = {item.record_id for item in identities}
    there = {short_hash(salt, "record", name) for name in known} if seen.subject_of else set()
    erased_in = {digest[:HASH_LENGTH]: number for digest, number in erased.items()}
    found, missing = Resolution(), []
    for request in requests:
        before = seen.named_by(request.record_ids, request.subjects, salt)
        if before - there - erased_in.keys():
            missing.append(request.number)
            continue
        named = set(request.record_ids).union(*(of_subject.get(name, ()) for name in request.subjects))
        rounds = {record: erased.get(name_hash(salt, "record", record)) for record in named}
        gone = [number for number in rounds.values() if number is not None]
        gone += [erased_in[digest] for digest in before & erased_in.keys()]
        to_erase = {r for r, number in rounds.items() if number is None and r in known and r not in never_trained_on}
        if to_erase:
            found.erase[request.number] = tuple(sorted(to_erase))
        elif gone:
            found.already[request.number] = max(gone)
        elif named & known:
            found.denied[request.number] = Reason.NOT_IN_TRAINING_DATA
        else:
            found.denied[request.number] = Reason.UNKNOWN_ID
    return replace(found, missing=tuple(missing))
