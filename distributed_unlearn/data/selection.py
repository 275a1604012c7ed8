"""Which records are forgotten, held out and retained, as indices into a corpus."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distributed_unlearn.config import SelectionConfig
from distributed_unlearn.data.batches import NamedCorpus
from distributed_unlearn.data.classes import LabelledCorpus
from distributed_unlearn.errors import DataError


@dataclass(frozen=True, eq=False)
class Partition:
    """Disjoint sets of records; every array is int64 and sorted."""

    forget_rounds: tuple[np.ndarray, ...]
    """Round `k` forgets the records `forget_rounds[k]`."""
    holdout: np.ndarray
    """Records that were never trained on."""
    training: np.ndarray
    """All records that may be trained on: never the holdout, nor what an earlier job erased."""
    erased_before: tuple[np.ndarray, ...] = ()
    """What earlier jobs erased, one set for each of their rounds; without what this job forgets once more."""

    def retain(self, round_index: int) -> np.ndarray:
        """The training records that no round up to and including `round_index` forgets.

        Args:
            round_index: From 0; -1 gives all training records.

        Returns:
            int64 [num_retain_records], sorted.
        """
        assert -1 <= round_index < max(len(self.forget_rounds), 1)
        forgotten = _union(self.forget_rounds[: round_index + 1])
        return np.setdiff1d(self.training, forgotten, assume_unique=True)


def resolve(selection: SelectionConfig, corpus: NamedCorpus, holdout: np.ndarray | None = None) -> np.ndarray:
    """Indices of the records that a selection names by subject, id, ids file or class; the union of all four.

    `selection.path` names no record of `corpus`; see `partition_records`. `holdout` are records that `classes` leaves
    out.

    Returns:
        int64 [num_selected], sorted, each index once.

    Raises:
        DataError: an ids file that cannot be read, or an unknown id, subject or class.
    """
    ids = [*selection.record_ids, *read_ids(selection.ids_file)]
    index_of = {record_id: index for index, record_id in enumerate(corpus.record_ids)}
    _refuse_unknown("record id", ids, index_of.keys())
    known_subjects = {subject_id for subject_id in corpus.subject_ids if subject_id is not None}
    _refuse_unknown("subject", selection.subjects, known_subjects)
    subjects = frozenset(selection.subjects)
    chosen = {index_of[record_id] for record_id in ids}
    chosen.update(index for index, subject_id in enumerate(corpus.subject_ids) if subject_id in subjects)
    by_name = np.array(sorted(chosen), dtype=np.int64)
    if not selection.classes:
        return by_name
    # A class is everybody's: the held-out records of it were never trained on, and so are not to be forgotten.
    if not isinstance(corpus, LabelledCorpus):
        raise DataError(
            "a selection by classes of records that have none",
            "subjects, record_ids or ids_file",
            "select in another way, or set model.task to a classifier's",
        )
    of_classes = corpus.of_classes(selection.classes)
    return _union((by_name, of_classes if holdout is None else np.setdiff1d(of_classes, holdout)))


def partition_records(
    corpus: NamedCorpus,
    forget_selections: Sequence[SelectionConfig],
    holdout_selection: SelectionConfig | None,
    num_main_records: int,
    erased: Sequence[np.ndarray] = (),
) -> Partition:
    """Split a corpus into forget sets, holdout set, what was erased before, and the rest.

    Args:
        corpus: The training records, followed by those of a separate holdout file if there is one.
        forget_selections: One per round, in order.
        holdout_selection: Held-out records among the first `num_main_records`, besides those of a separate file.
        num_main_records: Records at this index and after come from the holdout file and are all held out.
        erased: Records that earlier jobs erased, one set for each of their rounds. They may be forgotten once more,
            but neither retained nor held out.

    Returns:
        The partition.

    Raises:
        DataError: unknown ids, a record both to be forgotten and held out, a record forgotten in two rounds, a record
            held out that was erased before, an empty forget or holdout set, or nothing left to retain.
    """
    assert 0 <= num_main_records <= corpus.num_records
    separate = np.arange(num_main_records, corpus.num_records, dtype=np.int64)
    chosen = resolve(holdout_selection, corpus) if holdout_selection is not None else separate
    holdout = _union((chosen, separate))
    rounds = tuple(resolve(selection, corpus, holdout) for selection in forget_selections)
    if holdout_selection is not None and len(holdout) == 0:
        raise DataError("an empty holdout set", "at least one record", "name records in holdout")
    _refuse_overlaps(corpus, rounds, holdout)
    gone = _union(erased)
    _refuse_known_holdout(corpus, np.intersect1d(holdout, gone))
    training = np.setdiff1d(np.arange(num_main_records, dtype=np.int64), _union((holdout, gone)))
    forgotten = _union(rounds)
    partition = Partition(rounds, holdout, training, tuple(np.setdiff1d(part, forgotten) for part in erased))
    if len(partition.retain(len(rounds) - 1)) == 0:
        raise DataError(
            f"no record left to retain: {len(forgotten)} to be forgotten, {len(holdout)} held out and {len(gone)} "
            f"erased before of {corpus.num_records}",
            "at least one record that stays",
            "forget or hold out fewer records",
        )
    return partition


def _refuse_overlaps(corpus: NamedCorpus, rounds: Sequence[np.ndarray], holdout: np.ndarray) -> None:
    for index, forget in enumerate(rounds):
        number = index + 1
        if len(forget) == 0:
            raise DataError(f"an empty forget set in round {number}", "at least one record", "name records")
        both = np.intersect1d(forget, holdout)
        if len(both):
            raise DataError(
                f"{len(both)} record(s) both to be forgotten (round {number}) and held out, "
                f"e.g. {_some_ids(corpus, both)}",
                "a holdout set that was never trained on",
                "take them out of forget or out of holdout",
            )
        twice = np.intersect1d(forget, _union(rounds[:index]))
        if len(twice):
            raise DataError(
                f"{len(twice)} record(s) of round {number} that an earlier round forgets, "
                f"e.g. {_some_ids(corpus, twice)}",
                "every record in one round at most",
                "remove them from the later round",
            )


def _refuse_known_holdout(corpus: NamedCorpus, known: np.ndarray) -> None:
    if len(known):
        raise DataError(
            f"{len(known)} record(s) held out that were erased from the checkpoint before, e.g. "
            f"{_some_ids(corpus, known)}",
            "a holdout set that was never trained on",
            "take them out of holdout",
        )


def _union(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))


def read_ids(ids_file: str | None) -> list[str]:
    """The ids in a file, one a line; none without a file.

    Raises:
        DataError: a file that cannot be read or names nobody.
    """
    if ids_file is None:
        return []
    try:
        lines = Path(ids_file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"ids file '{ids_file}', which cannot be read ({type(error).__name__})",
            "a UTF-8 text file with one id a line",
            "check the path",
        ) from error
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise DataError(f"ids file '{ids_file}' without ids", "one id a line", "add ids or remove ids_file")
    return ids


def _refuse_unknown(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    unknown = sorted(set(names).difference(known))
    if unknown:
        raise DataError(
            f"{len(unknown)} unknown {what}(s) of {len(set(names))}, e.g. {', '.join(map(repr, unknown[:5]))}",
            f"{what}s that occur in the data",
            "check the selection, data.id_field and data.subject_field",
        )


def _some_ids(corpus: NamedCorpus, indices: np.ndarray) -> str:
    return ", ".join(repr(corpus.record_ids[index]) for index in indices[:5])
