"""Where a run stands inside a round: what the driver needs to go on from there. Standard library only."""

from dataclasses import dataclass
from pathlib import Path

from distributed_unlearn.records.codec import read_formatted
from distributed_unlearn.records.round import RoundRecord
from distributed_unlearn.records.scores import SetScores
from distributed_unlearn.records.step import StepRecord

STATE_FORMAT = 1


@dataclass(frozen=True)
class RoundState:
    """A round after some of its steps. Weights and vectors are in a file of every rank beside it."""

    format: int
    job_sha256: str
    """Of the job, its base checkpoint and its data: what must be as it was."""
    world_size: int
    round_index: int
    """From 0."""
    before: dict[str, SetScores]
    """Scores at the round's start, which are measured again and must agree."""
    steps: tuple[StepRecord, ...]
    measured: tuple[dict[str, float], ...]
    """What was measured after each of `steps`."""
    solver: dict[str, float]
    """What the method remembers between steps."""
    num_matching_checks: int
    """Consecutive checks so far for which the stopping rule's conditions held."""
    elapsed_seconds: float
    """Since the round's first step."""
    rounds: tuple[RoundRecord, ...]
    """The rounds before this one."""
    files: dict[str, str]
    """SHA-256 of the ranks' files."""


def read_state(path: Path) -> RoundState:
    """The state in a file.

    Raises:
        DataError: no such file, no JSON, another format, or a field that is missing, unknown or of another type.
    """
    start_over = "set resume to false to start over"
    return read_formatted(RoundState, path, "state", STATE_FORMAT, start_over, {None: start_over})
