"""What an evaluation works with: its models, its sets, its corpus, and whom to ask."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from distributed_unlearn.config import EvaluateConfig, MetricGroup
from distributed_unlearn.data.batches import NamedCorpus
from distributed_unlearn.evaluation.gather import AS_IT_IS, Condition, Gatherer, Subject
from distributed_unlearn.evaluation.rows import RowMaker
from distributed_unlearn.models.processor import Tokenizer
from distributed_unlearn.records.evaluation import MetricRow
from distributed_unlearn.workers.survey import Survey


@dataclass(frozen=True, eq=False)
class Bench:
    """Everything that the parts of an evaluation share."""

    config: EvaluateConfig
    wanted: frozenset[MetricGroup]
    subjects: tuple[Subject, ...]
    """The model first; then the retrained one and the second retrained one, where there are such."""
    corpus: NamedCorpus
    sets: Mapping[str, np.ndarray]
    """Sorted records by `forget`, `retain` and, where there is one, `holdout`."""
    tokenizer: Tokenizer | None
    """None: records are not texts."""
    context_length: int | None
    gatherer: Gatherer

    @cached_property
    def rows(self) -> RowMaker:
        """For all models."""
        return RowMaker(tuple(subject.role for subject in self.subjects), self.config.num_resamples)

    @property
    def is_language_model(self) -> bool:
        """Whether answers have tokens; else a record has one prediction, its class."""
        return self.config.model.task == "causal_lm"

    def subject(self, role: str) -> Subject | None:
        """The model of that role."""
        return next((subject for subject in self.subjects if subject.role == role), None)

    def survey(self, subject: Subject, set_name: str, indices: np.ndarray, condition: Condition) -> Survey:
        """Of one model on one set; as it is, with the divergence to the retrained model where that is wanted."""
        compared = subject.role != "retrained" and condition is AS_IT_IS and "divergence" in self.wanted
        against = self.subject("retrained") if compared else None
        what = f"scoring {set_name}{condition.words}"
        return self.gatherer.survey(subject, self.corpus, indices, what, against, condition)


class Part(Protocol):
    """Some of an evaluation's metrics: evidence of one model after the other, then rows."""

    def gather(self, subject: Subject) -> None:
        """Have measured what the metrics need of a model."""
        ...

    def rows(self) -> list[MetricRow]:
        """The metrics, once every model was measured."""
        ...
