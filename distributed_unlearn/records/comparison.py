"""A comparison of methods, whole: what `comparison.json` holds, written and read back. Standard library only."""

from dataclasses import dataclass
from pathlib import Path

from distributed_unlearn.records.codec import read_formatted
from distributed_unlearn.records.scores import SetScores

COMPARISON_NAME = "comparison.json"
COMPARISON_FORMAT = 1


@dataclass(frozen=True)
class CellRound:
    """One round of one method with one seed; scores are of `forget`, `retain`, `holdout` and what was erased before."""

    scores: dict[str, SetScores]
    tug_of_war: float | None
    """Against the reference of this very round; None where there is none."""
    verdict: str
    num_steps: int
    num_products: int
    update_norm: float
    """`||w_end - w_start||` of the round."""
    wall_seconds: float


@dataclass(frozen=True)
class Cell:
    """One method with one seed."""

    label: str
    seed: int
    folder: str
    """Of its run, relative to the comparison's."""
    failure: str | None
    """Why the method ended without a result, in a sentence; None where it has one."""
    before: dict[str, SetScores]
    """The original on the sets of the first round; empty after a failure."""
    rounds: tuple[CellRound, ...]
    """Empty after a failure."""


@dataclass(frozen=True)
class Reference:
    """A retrained model's scores on the sets of the round after which it is the reference."""

    seed: int
    round_index: int
    """From 0."""
    folder: str
    scores: dict[str, SetScores]
    wall_seconds: float | None
    """Of its training; None where it was given."""
    tug_of_war: float | None
    """Of a reference that was trained once more, against the first; None of the first."""


@dataclass(frozen=True)
class Comparison:
    """All cells that have ended so far, in the order of methods, then seeds."""

    format: int
    num_rounds: int
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    config: dict[str, object]
    """The base job, resolved; selections of people are replaced by what kind of selections they were."""
    settings: dict[str, object]
    """By label: solver, objective and curvature of the method."""
    versions: dict[str, str | None]
    hardware: dict[str, str]
    started_at: str
    original: str | None
    """Folder of the original, where the comparison trained it."""
    original_seconds: float | None
    original_tug_of_war: float | None
    """Of the original against the first round's reference."""
    references: tuple[Reference, ...]
    cells: tuple[Cell, ...]
    num_cells: int
    """That there will be."""

    def of(self, label: str) -> tuple[Cell, ...]:
        """The cells of a method that ended with a result."""
        return tuple(cell for cell in self.cells if cell.label == label and cell.failure is None)

    def reference(self, round_index: int) -> Reference | None:
        """The reference after a round."""
        return next((r for r in self.references if r.round_index == round_index and r.tug_of_war is None), None)


def read_comparison(folder: Path) -> Comparison:
    """The comparison in a folder.

    Raises:
        DataError: none there, or one of another format.
    """
    other = "read it with the version of distributed-unlearn that wrote it, or compare again"
    path, missing = folder / COMPARISON_NAME, "give the output folder of `compare`"
    return read_formatted(Comparison, path, "comparison", COMPARISON_FORMAT, missing, {None: other})
