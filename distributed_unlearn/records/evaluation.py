"""One evaluation, whole: what `evaluation.json` holds, written and read back. Standard library only."""

from dataclasses import dataclass, field
from pathlib import Path

from distributed_unlearn.errors import DataError
from distributed_unlearn.records.codec import read_formatted

FORMAT = 1
EVALUATION_NAME = "evaluation.json"


@dataclass(frozen=True)
class MetricRow:
    """One metric on one set."""

    name: str
    """As in `evaluation.metrics.catalogue`; of a membership attack with its name: `mia_auc_min_k`."""
    title: str
    sentence: str
    """What it says, for a reader who is no specialist."""
    better: str
    """`higher`, `lower`, `zero`, or `reference`: as near as possible to the retrained model's."""
    unit: str
    set_name: str
    """`forget`, `retain`, `holdout`, a perturbed set, or `all` for a number of several sets."""
    value: float
    low: float | None = None
    """Ends of a 95 % bootstrap interval over records; None where there is none."""
    high: float | None = None
    retrained: float | None = None
    """The retrained model's value; None: there is no such model, or the metric is a distance to it."""
    noise_floor: float | None = None
    """How far two retrained models of different seeds lie apart; None without a second one."""
    num_records: int | None = None
    condition: str = ""
    """What was done to the model before, e.g. `after rounding to 4 bits`; empty: nothing."""
    note: str = ""
    """How the number is to be read: which mean, which distance."""


@dataclass(frozen=True)
class NotMeasured:
    """A metric that could not be measured, and why: never a number in its place."""

    name: str
    why: str


@dataclass(frozen=True)
class EvaluatedModel:
    """A checkpoint as it was measured."""

    path: str
    sha256: str
    """Over all its files (for a hub model over name and commit): what cached numbers are kept under."""


@dataclass(frozen=True)
class EvaluationRecord:
    """What one checkpoint was found to know."""

    started_at: str
    """UTC, ISO 8601."""
    config: dict[str, object]
    """The resolved evaluation file; which records are to be forgotten only by kind."""
    versions: dict[str, str | None]
    evaluator_version: int
    model: EvaluatedModel
    retrained: EvaluatedModel | None
    retrained_again: EvaluatedModel | None
    num_records: dict[str, int]
    """Of each set, as measured."""
    rows: tuple[MetricRow, ...]
    not_measured: tuple[NotMeasured, ...]
    loss_quantiles: dict[str, dict[str, tuple[float, ...]]]
    """By model (`model`, `retrained`), then by set: quantiles 0, 0.02, ..., 1 of the records' mean answer losses, nats
    per token."""
    depth_by_block: dict[str, tuple[float, ...]] | None
    """By set: share of answer tokens that a linear probe reads from each block's output; None: not asked for."""
    wall_seconds: float
    num_cached: int
    """Parts that were taken from the cache."""
    format: int = field(default=FORMAT)

    def find(self, name: str, set_name: str, condition: str = "") -> MetricRow:
        """The row of a metric on a set.

        Raises:
            DataError: it was not measured; with the reason where one is known.
        """
        for row in self.rows:
            if (row.name, row.set_name, row.condition) == (name, set_name, condition):
                return row
        why = next((item.why for item in self.not_measured if item.name == name), "this evaluation does not have it")
        raise DataError(f"no {name} on '{set_name}': {why}", "a metric that was measured", "evaluate again with it")


def read_evaluation(path: Path) -> EvaluationRecord:
    """The evaluation in a file.

    Raises:
        DataError: no such file, no JSON, another format, or a field that is missing, unknown or of another type.
    """
    other = "read it with the version of distributed-unlearn that wrote it"
    missing = "give the file that `evaluate` wrote"
    return read_formatted(EvaluationRecord, path, "evaluation", FORMAT, missing, {None: other})
