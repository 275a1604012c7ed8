"""Labelled records: inputs of a classifier with the class of each, as arrays that every worker can share.

A label is spelt as in the data; `class_number` says which of the model's classes it means.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distributed_unlearn.config import DataConfig
from distributed_unlearn.data.batches import Corpus, PredictionBatch
from distributed_unlearn.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Labels:
    """Whose record it is and which class it belongs to, record by record."""

    classes: np.ndarray
    """int64 [num_records], each in `[0, len(class_names))`."""
    record_ids: tuple[str, ...]
    subject_ids: tuple[str | None, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.classes) == len(self.record_ids) == len(self.subject_ids)

    @classmethod
    def join(cls, parts: "Sequence[Labels]") -> "Labels":
        """One after the other.

        Raises:
            DataError: an id that occurs in more than one of them.
        """
        counts = Counter(record_id for part in parts for record_id in part.record_ids)
        repeated = [record_id for record_id, count in counts.items() if count > 1]
        if repeated:
            raise DataError(
                f"{len(repeated)} record id(s) that occur in more than one file, e.g. "
                f"{', '.join(map(repr, repeated[:5]))}",
                "ids that are unique over all files",
                "give the holdout file an id column with ids of its own, or a split that the data does not have",
            )
        return cls(
            np.concatenate([part.classes for part in parts]),
            tuple(record_id for part in parts for record_id in part.record_ids),
            tuple(subject_id for part in parts for subject_id in part.subject_ids),
            parts[0].class_names,
        )


def class_names_of(hf_config: Any, data: DataConfig) -> tuple[str, ...]:
    """Names of the model's classes 0, 1, ...: `data.label_names`, else those of the checkpoint's `id2label`.

    Raises:
        ConfigError: `data.label_names` names more or fewer classes than the checkpoint has.
    """
    num_classes = int(hf_config.num_labels)
    if data.label_names is None:
        return tuple(str(hf_config.id2label[number]) for number in range(num_classes))
    if len(data.label_names) != num_classes:
        raise ConfigError(
            f"data.label_names with {len(data.label_names)} names for a checkpoint of {num_classes} classes",
            f"{num_classes} names, that of class 0 first",
            "correct data.label_names, or make the checkpoint with as many classes (num_labels)",
        )
    return data.label_names


def class_number(label: str, names: tuple[str, ...], record_id: str) -> int:
    """The class that a label means: the one whose name it is, else the one whose number it is, from 0.

    Raises:
        DataError: neither a name nor a number of a class.
    """
    if label in names:
        return names.index(label)
    if label.isascii() and label.isdigit() and int(label) < len(names):
        return int(label)
    shown = f"'{label}'" if label.lstrip("+-").isdigit() and len(label) < 20 else f"of {len(label)} characters"
    raise DataError(
        f"a label {shown} in record '{record_id}'",
        f"the name of one of the {len(names)} classes, or its number from 0 to {len(names) - 1}",
        "set data.label_names to the labels as the data spells them, that of class 0 first; or correct the record, or "
        "name another column in data.label_field",
    )


@dataclass(frozen=True, eq=False)
class LabelledCorpus:
    """The driver's corpus of a classifier: what the workers read, and whose records they are; a `NamedCorpus`."""

    records: Corpus
    labels: Labels

    def __post_init__(self) -> None:
        assert self.records.num_records == len(self.labels.classes)

    @property
    def num_records(self) -> int:
        """Number of records."""
        return self.records.num_records

    @property
    def record_ids(self) -> tuple[str, ...]:
        """Every record's id."""
        return self.labels.record_ids

    @property
    def subject_ids(self) -> tuple[str | None, ...]:
        """Whose record it is, where the data say so."""
        return self.labels.subject_ids

    @property
    def largest_token_id(self) -> int | None:
        """See `Corpus.largest_token_id`."""
        return self.records.largest_token_id

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """See `Corpus.lengths`."""
        return self.records.lengths(indices)

    def num_answer_tokens(self, indices: np.ndarray) -> np.ndarray:
        """See `Corpus.num_answer_tokens`."""
        return self.records.num_answer_tokens(indices)

    def batch(self, indices: np.ndarray) -> PredictionBatch:
        """See `Corpus.batch`."""
        return self.records.batch(indices)

    def without_ids(self) -> Corpus:
        """What workers need."""
        return self.records

    def of_classes(self, wanted: Sequence[int | str]) -> np.ndarray:
        """Records of the classes that are wanted, by number or by name: int64, sorted.

        Raises:
            DataError: no such class.
        """
        names = self.labels.class_names
        unknown = [value for value in wanted if not (value in names or value in range(len(names)))]
        if unknown:
            raise DataError(
                f"{len(unknown)} unknown class(es) of {len(wanted)}, e.g. {', '.join(map(repr, unknown[:5]))}",
                f"names of classes, or numbers from 0 to {len(names) - 1}",
                "check the selection against the checkpoint's id2label and data.label_names",
            )
        numbers = [value if isinstance(value, int) else names.index(value) for value in wanted]
        return np.flatnonzero(np.isin(self.labels.classes, numbers)).astype(np.int64)
