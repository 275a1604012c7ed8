"""The state of an interrupted run: saved now and then inside a round, found again, removed when the run is complete.

`state/round_<k>_step_<n>` in the output folder is written aside and renamed when complete; only then the one before it
goes. So a kill at any instant leaves one that is whole, or none.
"""

import hashlib
import json
import math
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distributed_unlearn.config import JobConfig, SaveConfig
from distributed_unlearn.data.prepare import PreparedData
from distributed_unlearn.errors import ConfigError, DataError
from distributed_unlearn.files import complete_folder, write_json
from distributed_unlearn.provenance import hash_folder
from distributed_unlearn.records import RoundRecord, RoundState, SetScores, StepRecord, read_state, to_json
from distributed_unlearn.records.state import STATE_FORMAT
from distributed_unlearn.rounds.methods import OuterSolver
from distributed_unlearn.rounds.origin import Origin, redacted_config
from distributed_unlearn.workers.client import Workers

STATE_FOLDER = "state"
_NAME = re.compile(r"round_(\d+)_step_(\d+)")
_CLUSTER_KEYS = ("backend", "num_workers", "zero_stage", "use_gpu", "cpus_per_worker")
"""Of `cluster`, what can change a bit of the result; addresses and time limits may differ when a run goes on."""
_FREE_KEYS = ("output", "overwrite", "resume", "save", "cluster")
"""What may differ altogether: where results go and how they are written."""


def job_hash(job: JobConfig, data: PreparedData, origin: Origin) -> str:
    """SHA-256 of what must be as it was for a run to go on: the job, its base checkpoint, its records and their sets.

    Of the records it covers ids, sizes and sets; their content shows in the scores at the round's start.
    """
    tree: dict[str, Any] = {key: value for key, value in redacted_config(job).items() if key not in _FREE_KEYS}
    tree["cluster"] = {key: getattr(job.cluster, key) for key in _CLUSTER_KEYS}
    tree["base"] = to_json(origin.base)
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    digest.update("\0".join(data.corpus.record_ids).encode())
    everything, partition = np.arange(data.corpus.num_records), data.partition
    sets = (*partition.forget_rounds, partition.holdout, partition.training, *partition.erased_before)
    for part in (data.corpus.lengths(everything), data.corpus.num_answer_tokens(everything), *sets):
        digest.update(f"{len(part)}:".encode() + np.ascontiguousarray(part, dtype=np.int64).tobytes())
    return digest.hexdigest()


def forget_state(output: Path) -> None:
    """The run in this folder is complete: there is nothing to go on with."""
    shutil.rmtree(output / STATE_FOLDER, ignore_errors=True)


@dataclass(frozen=True)
class FoundState:
    """A state on disk, checked."""

    folder: Path
    state: RoundState


def _saved(output: Path) -> list[tuple[int, int, Path]]:
    """Every complete state in an output folder as (round, steps, path), the newest last."""
    named = [(_NAME.fullmatch(path.name), path) for path in (output / STATE_FOLDER).glob("*")]
    return sorted((int(match[1]), int(match[2]), path) for match, path in named if match is not None)


def has_state(output: Path) -> bool:
    """Whether there is a state in the folder, of this job or another."""
    return bool(_saved(output))


def newest_state(output: Path) -> tuple[str, int] | None:
    """Name of the newest state in the folder and when it was written, which tell it from every other; or None."""
    saved = _saved(output)
    return (saved[-1][2].name, saved[-1][2].stat().st_mtime_ns) if saved else None


def find_state(output: Path, job_sha256: str, world_size: int) -> FoundState | None:
    """The newest state in an output folder, if there is one; checked to be whole and of this job.

    Raises:
        ConfigError: a state of another job or another number of workers.
        DataError: a state that is damaged.
    """
    saved = _saved(output)
    if not saved:
        return None
    folder = saved[-1][2]
    state = read_state(folder / "state.json")
    if state.job_sha256 != job_sha256 or state.world_size != world_size:
        raise ConfigError(
            f"resume: true and a state in '{folder}' of another job, base checkpoint, data or number of workers",
            "the job as it was; only output, overwrite, save and the cluster's address and time limits may differ",
            "take the changes back, or set resume to false to start over",
        )
    if hash_folder(folder, (".safetensors",)) != state.files:
        raise DataError(
            f"a state in '{folder}' whose files are not those that were written",
            "the files as they were",
            "put them back, or set resume to false to start over",
        )
    return FoundState(folder, state)


class StateKeeper:
    """Saves the state of one run."""

    def __init__(self, output: Path, config: SaveConfig, job_sha256: str, workers: Workers) -> None:
        self._output, self._config, self.job_sha256, self._workers = output, config, job_sha256, workers
        self._last_saved = time.monotonic()

    @property
    def world_size(self) -> int:
        """Number of ranks, of which each has a file."""
        return self._workers.world_size

    def is_due(self, num_steps: int) -> bool:
        """Whether to save after this many steps of the round."""
        every, seconds = self._config.state_every_steps, self._config.state_every_seconds
        if every is not None and num_steps % every == 0:
            return True
        return seconds is not None and time.monotonic() - self._last_saved >= seconds

    def save(self, state: RoundState) -> None:
        """Write a state; the one before it goes when this one is complete. `state.files` is filled in here."""
        older = [path for _, _, path in _saved(self._output)]
        folder = self._output / STATE_FOLDER / f"round_{state.round_index + 1}_step_{len(state.steps)}"
        with complete_folder(folder, overwrite=True) as staging:
            hashes = self._workers.save_round(str(staging.resolve()))
            files = {f"rank_{rank}.safetensors": found for rank, found in enumerate(hashes)}
            write_json(staging / "state.json", to_json(replace(state, files=files)))
        for path in older:
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)
        self._last_saved = time.monotonic()


@dataclass(frozen=True)
class RoundKeeper:
    """The state of one round: what it goes on from, and where it is saved."""

    keeper: StateKeeper
    round_index: int
    earlier: tuple[RoundRecord, ...]
    """The rounds before this one."""
    found: FoundState | None
    """Of this very round; None: it starts at its first step."""

    def restore_start(self, workers: Workers) -> None:
        """Set the weights to those at the round's start, where they are not the base checkpoint's."""
        if self.found is not None:
            workers.restore_round_start(str(self.found.folder.resolve()))

    def restore(self, workers: Workers, before: dict[str, SetScores], solver: OuterSolver) -> None:
        """Go on from the state; the round has begun on the workers.

        Raises:
            ConfigError: `before`, the scores at the round's start, are not what they were.
        """
        if self.found is None:
            return
        state = self.found.state
        if before.keys() != state.before.keys() or not all(map(_agree, before.values(), map(state.before.get, before))):
            raise ConfigError(
                f"resume: true and scores at the start of round {self.round_index + 1} that differ from those in "
                f"'{self.found.folder}'",
                "the base checkpoint and the records as they were",
                "put them back, or set resume to false to start over",
            )
        workers.load_round(str(self.found.folder.resolve()))
        solver.load_state_dict(state.solver)

    def save_if_due(self, course: "Course", solver: OuterSolver) -> None:
        """Save the round's state after a step, where the job asks for it by now."""
        if self.keeper.is_due(len(course.steps)):
            self.keeper.save(
                RoundState(
                    format=STATE_FORMAT,
                    job_sha256=self.keeper.job_sha256,
                    world_size=self.keeper.world_size,
                    round_index=self.round_index,
                    before=course.before,
                    steps=tuple(course.steps),
                    measured=tuple(course.measured),
                    solver=solver.state_dict(),
                    num_matching_checks=course.num_matching_checks,
                    elapsed_seconds=time.monotonic() - course.started,
                    rounds=self.earlier,
                    files={},
                )
            )


@dataclass
class Course:
    """How a round has gone so far."""

    before: dict[str, SetScores]
    steps: list[StepRecord]
    measured: list[dict[str, float]]
    num_matching_checks: int
    started: float
    """On the monotonic clock; of a round that goes on as if it had not been interrupted."""

    def add(self, record: StepRecord, measured: dict[str, float], num_matching_checks: int) -> None:
        """One more step, and what was measured after it."""
        self.steps.append(record)
        self.measured.append(measured)
        self.num_matching_checks = num_matching_checks

    @staticmethod
    def begin(before: dict[str, SetScores], found: FoundState | None) -> "Course":
        """At the first step, or where a state left it."""
        if found is None:
            return Course(before, [], [], 0, time.monotonic())
        state = found.state
        started = time.monotonic() - state.elapsed_seconds
        return Course(before, list(state.steps), list(state.measured), state.num_matching_checks, started)


def _agree(now: SetScores, then: SetScores | None) -> bool:
    """The same records, scored alike up to the rounding of another machine."""
    if then is None or (now.num_records, now.num_answer_tokens) != (then.num_records, then.num_answer_tokens):
        return False
    return math.isclose(now.loss_nats_per_token, then.loss_nats_per_token, rel_tol=1e-4)
