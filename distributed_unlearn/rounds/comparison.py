"""What a comparison keeps of its runs: cells from their records, references from those of their trainings."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from distributed_unlearn.config import JobConfig
from distributed_unlearn.errors import ConfigError, DataError
from distributed_unlearn.evaluation.metrics import tug_of_war
from distributed_unlearn.files import expand_home, write_json
from distributed_unlearn.provenance import hash_file
from distributed_unlearn.records import RECORD_NAME, RunRecord, SetScores, read_record, to_json
from distributed_unlearn.records.codec import from_json, read_json
from distributed_unlearn.records.comparison import Cell, CellRound, Reference
from distributed_unlearn.report.tables import SETS
from distributed_unlearn.rounds.preparation import PreparedRun
from distributed_unlearn.rounds.state import find_state

_CELL_NAME = "cell.json"


def content_hash(run: PreparedRun) -> str:
    """SHA-256 of what a run's result depends on: the job, the files of its base checkpoint, its records.

    The hash of the job covers ids and sizes of the records, see `rounds.state.job_hash`; local data files are read.
    """
    digest = hashlib.sha256(run.job_sha256.encode())
    path = run.job.data.path
    for file in map(Path, map(expand_home, (path,) if isinstance(path, str) else path)):
        if file.is_file():
            digest.update(hash_file(file).encode())
    return digest.hexdigest()


def going_on(run: PreparedRun) -> PreparedRun:
    """The run, from the state that an interrupted run of the same job left in its folder, where there is one."""
    job = run.job.model_copy(update={"resume": True})
    try:
        found = find_state(run.folder, run.job_sha256, job.cluster.num_workers)
    except (ConfigError, DataError):  # another job's, or damaged
        found = None
    return run if found is None else replace(run, job=job, found=found)


def finished_training(folder: Path) -> RunRecord | None:
    """The record of a training that has ended in this folder, scored and with its checkpoint; None where none has."""
    try:
        record = read_record(folder / RECORD_NAME)
    except DataError:
        return None
    ended = record.training is not None and record.training.scores is not None
    return record if ended and (folder / "checkpoint").is_dir() else None


def reference_scores(record: RunRecord, round_index: int) -> dict[str, SetScores]:
    """The scores of a reference that was trained without rounds 0 to `round_index`, by the names of a round's sets."""
    assert record.training is not None and record.training.scores is not None
    scores = record.training.scores
    forget = "forget" if round_index == 0 else f"forget_round_{round_index + 1}"
    found = {"forget": scores.get(forget), "retain": scores.get("retain"), "holdout": scores.get("holdout")}
    return {name: value for name, value in found.items() if value is not None}


def closeness(scores: Mapping[str, SetScores], reference: Mapping[str, SetScores] | None) -> float | None:
    """The Tug-of-War over the sets that both have; None without a reference."""
    if reference is None:
        return None
    return tug_of_war(scores, reference, tuple(name for name in SETS if name in reference and name in scores))


def cell_of(record: RunRecord, label: str, seed: int, folder: str, references: tuple[Reference, ...]) -> Cell:
    """What a comparison keeps of a run: each round against the reference of that round."""
    by_round = {item.round_index: item.scores for item in references if item.tug_of_war is None}
    rounds = []
    for item in record.rounds:
        reference = by_round.get(item.round_index)
        rounds.append(
            CellRound(
                scores=item.after,
                tug_of_war=item.tug_of_war if reference is None else closeness(item.after, reference),
                verdict=item.verdict.words,
                num_steps=item.num_steps,
                num_products=item.num_products,
                update_norm=item.update_norm,
                wall_seconds=item.wall_seconds,
            )
        )
    return Cell(label, seed, folder, None, record.rounds[0].before, tuple(rounds))


def failed_cell(label: str, seed: int, folder: str, failure: str) -> Cell:
    """A method that ended without a result."""
    return Cell(label, seed, folder, failure, {}, ())


def write_cell(folder: Path, cell: Cell, sha256: str) -> None:
    """Note in its folder that a cell is finished, and what it was made from."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _CELL_NAME, {"sha256": sha256, "cell": to_json(cell)})


def finished_cell(folder: Path, sha256: str) -> Cell | None:
    """The cell that has ended in this folder, made from the same; None where none has."""
    path = folder / _CELL_NAME
    if not path.is_file():
        return None
    tree = read_json(path, f"cell '{path}'", "remove it: the method will be run again")
    if not isinstance(tree, dict) or tree.get("sha256") != sha256:
        return None
    return from_json(Cell, tree.get("cell"), f"cell '{path}'")


def shown_settings(job: JobConfig) -> dict[str, object]:
    """Solver, objective and curvature of a method, as they were resolved."""
    tree = job.model_dump(mode="json")
    return {name: tree[name] for name in ("solver", "objective", "curvature")}


def hardware(num_workers: int) -> dict[str, str]:
    """What times were measured on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = f"{len(lines)} x {lines[0].partition(':')[2].strip()}" if lines else model
    return {"cpu": model, "system": platform.platform(), "workers": str(num_workers)}


def again(reference: Reference, first: Reference) -> Reference:
    """A reference that was trained once more, with its closeness to the first."""
    return replace(reference, tug_of_war=closeness(reference.scores, first.scores))
