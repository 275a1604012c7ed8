"""One run, whole: what `record.json` holds, written and read back. Standard library only.

Every table, figure and page of a result is drawn from a `RunRecord` that was read from its file.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distributed_unlearn.records.codec import read_formatted
from distributed_unlearn.records.result import CurvatureMode, SurvivingUpdate
from distributed_unlearn.records.round import RoundRecord
from distributed_unlearn.records.scores import SetScores
from distributed_unlearn.records.verdict import RunVerdict

FORMAT = 2
"""Version of `record.json`; 1 had no `kind`, no `num_retain_records` and could not be read back."""
RECORD_NAME = "record.json"


@dataclass(frozen=True)
class BaseCheckpoint:
    """The checkpoint that a run started from, as it was before the first step."""

    path: str
    """As the job file says it."""
    revision: str | None
    """Commit of a hub model."""
    files: dict[str, str] | None
    """SHA-256 by file name of a folder's own files; None for a hub model."""
    others: dict[str, dict[str, str]] = field(default_factory=dict)
    """The same of the other folders that are opened with it, by path: an adapter's, or those of an adapter's base."""


@dataclass(frozen=True)
class ResultFiles:
    """The checkpoint that a run wrote."""

    id: str
    """128 random bits, also in the mark inside the checkpoint."""
    files: dict[str, str]
    """SHA-256 by path below the checkpoint's folder."""


@dataclass(frozen=True)
class TrainingRecord:
    """A training run; losses in nats per token."""

    num_records: int
    """Records trained on."""
    num_steps: int
    last_loss_nats_per_token: float
    wall_seconds: float
    scores: dict[str, SetScores] | None
    """Keys `trained_on`, `retain`, `holdout`, `forget` (of several rounds `forget_round_<k>`, k from 1) and
    `erased_before_<k>` of earlier jobs; None: not scored yet."""


@dataclass(frozen=True)
class RunRecord:
    """One run of a job: what it was asked, what it started from, what it did and how its result stands."""

    kind: Literal["unlearning", "training"]
    started_at: str
    """UTC, ISO 8601."""
    config: dict[str, object]
    """The resolved job, its forget selections replaced by what kind of selections they were."""
    versions: dict[str, str | None]
    """Of the packages that a result depends on."""
    base: BaseCheckpoint
    result: ResultFiles
    num_retain_records: int | None
    """Training records that no round of this job and no earlier job erased; None where nothing is to be erased."""
    num_erased_before: int
    """Records that earlier jobs had erased from the base checkpoint; one that two jobs erased counts once."""
    num_erased_before_not_in_data: int
    parent: str | None
    """SHA-256 of the base checkpoint's own record; None where it has none."""
    salt_sha256: str | None
    """So that another salt is recognised; None where nothing was erased, before or now."""
    erased_before_sha256_salted: tuple[tuple[str, ...], ...]
    """Hashes of the ids that each round of earlier jobs erased, sorted; the salt is in `record.salt`."""
    erased_ids_sha256_salted: tuple[tuple[str, ...], ...]
    """Of each round of this job."""
    verdict: RunVerdict | None = None
    """None of a training, of which there is nothing to judge."""
    rounds: tuple[RoundRecord, ...] = ()
    surviving_update: SurvivingUpdate | None = None
    curvature_mode: CurvatureMode | None = None
    retrained: dict[str, SetScores] | None = None
    """The retrained reference on the sets of the last round, where the job names one."""
    training: TrainingRecord | None = None
    format: int = field(default=FORMAT)


def read_record(path: Path) -> RunRecord:
    """The record in a file.

    Raises:
        DataError: no such file, no JSON, another format, or a field that is missing, unknown or of another type.
    """
    remedies = {None: "read it with the version of distributed-unlearn that wrote it", 1: "run the job again"}
    return read_formatted(RunRecord, path, "record", FORMAT, "give the output folder of a finished run", remedies)
