"""Which records earlier jobs erased from the checkpoint that a job opens: by salted hashes, or named by the job."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers.utils import cached_file

from distributed_unlearn.config import AdapterFolder, ErasedConfig, ModelConfig
from distributed_unlearn.data.batches import NamedCorpus
from distributed_unlearn.data.selection import read_ids
from distributed_unlearn.errors import ModelError
from distributed_unlearn.files import expand_home
from distributed_unlearn.models.base_of_adapter import opened_as
from distributed_unlearn.provenance import MARK, Lineage, hash_ids, new_salt, read_lineage, read_mark, unknown_past


@dataclass(frozen=True, eq=False)
class ErasedBefore:
    """The records that earlier jobs erased, found again in this job's data."""

    sets: tuple[np.ndarray, ...] = ()
    """Indices into the corpus, int64, sorted: one set for every earlier round, the oldest first; some may be empty."""
    hashes: tuple[tuple[str, ...], ...] = ()
    """All that is handed on, one entry for each of `sets`: also those of ids that the data does not hold."""
    parent: str | None = None
    """SHA-256 of the record that the checkpoint came with."""
    salt: str | None = None
    """With which `hashes` were made; None where nothing was erased before."""
    num_unknown_subjects: int = 0
    """Subjects of `data.erased` of whom the data holds no record."""

    @property
    def num_records(self) -> int:
        """Records erased before, in the data or not; one that two jobs erased counts once."""
        return len({name for names in self.hashes for name in names})

    @property
    def num_unknown(self) -> int:
        """Those of them that the data does not hold: removed from the file since, or under another id."""
        return self.num_records - len(self.indices)

    def num_after(self, forget_rounds: Sequence[np.ndarray]) -> int:
        """Records that are erased once a job has forgotten these sets too; each counts once."""
        forgotten = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *forget_rounds]))
        return self.num_records + len(np.setdiff1d(forgotten, self.indices))

    @property
    def indices(self) -> np.ndarray:
        """All of `sets`: int64, sorted."""
        return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *self.sets]))


def checkpoint_lineage(model: ModelConfig, named: ErasedConfig | None) -> Lineage:
    """What the record of the checkpoint tells of earlier erasures; of an adapter that is gone on from, if it has one.

    Args:
        model: The checkpoint that the job opens, a hub name at the revision where it was found.
        named: `data.erased`. With it a record that is lost or spoilt is no error: the job says what was erased.

    Raises:
        ModelError: records were erased, and neither the checkpoint's record nor the job says which.
    """
    model = opened_as(model)
    path = Path(expand_home(model.path))
    try:
        if isinstance(model.adapter, AdapterFolder):  # its record hands on what was erased from its base before
            lineage = read_lineage(Path(expand_home(model.adapter.path)))
            if lineage.parent is not None:
                return lineage
        if path.is_dir():
            return read_lineage(path)
        downloaded = _hub_mark(model)
        mark = None if downloaded is None else read_mark(downloaded.parent)
        if mark is not None and mark.num_erased:
            raise unknown_past(
                f"'{model.path}', from which {mark.num_erased} record(s) were erased, without its record"
            )
    except ModelError:
        if named is None:
            raise
    return Lineage()


def find_erased(lineage: Lineage, named: ErasedConfig | None, corpus: NamedCorpus) -> ErasedBefore:
    """Find the records of `lineage` and of `data.erased` in the data.

    An id of `data.erased` that the data does not hold is handed on all the same: the data of a later job may hold it.

    Raises:
        DataError: an ids file that cannot be read.
    """
    if not lineage.erased and named is None:
        return ErasedBefore(parent=lineage.parent)
    salt = lineage.salt or new_salt()
    index_of = {hash_ids([record_id], salt)[0]: index for index, record_id in enumerate(corpus.record_ids)}
    hashes = list(lineage.erased)
    unknown_subjects = 0
    if named is not None:
        known = {name for names in hashes for name in names}
        subjects = frozenset(named.subjects)
        of_subjects = [i for i, subject_id in enumerate(corpus.subject_ids) if subject_id in subjects]
        unknown_subjects = len(subjects) - len({corpus.subject_ids[index] for index in of_subjects})
        ids = {*named.record_ids, *read_ids(named.ids_file), *(corpus.record_ids[index] for index in of_subjects)}
        added = tuple(name for name in hash_ids(ids, salt) if name not in known)
        hashes += [added] if added else []
    sets = tuple(np.array(sorted(index_of[name] for name in names if name in index_of), np.int64) for names in hashes)
    return ErasedBefore(sets, tuple(hashes), lineage.parent, salt, unknown_subjects)


def num_learned_again(reference: Path, record_ids: Sequence[str]) -> int | None:
    """How many of these records the training of a retrained reference did not leave out, by its own record.

    Returns:
        A count; None where the reference is not a result of this program or its record cannot be read.
    """
    try:
        lineage = read_lineage(reference)
    except ModelError:
        return None
    if lineage.parent is None:
        return None
    left_out = {name for names in lineage.erased for name in names}
    return sum(lineage.salt is None or hash_ids([name], lineage.salt)[0] not in left_out for name in record_ids)


def _hub_mark(model: ModelConfig) -> Path | None:
    """The mark of a model on the Hub; None where it has none, or where nobody can tell now."""
    try:
        found = cached_file(model.path, MARK, revision=model.revision)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)
