"""A job made ready: refused where it can be, its records read, its base hashed; then what a run works with."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distributed_unlearn.config import JobConfig, RetrainConfig, RmuConfig, SsdConfig
from distributed_unlearn.data.prepare import PreparedData, prepare_data
from distributed_unlearn.data.selection import Partition
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.files import refuse_existing
from distributed_unlearn.models.base_of_adapter import model_to_retrain, opened_as, reference_model
from distributed_unlearn.models.fit import check_checkpoint, check_layer
from distributed_unlearn.models.reference import require_comparable
from distributed_unlearn.report.run_log import RunLog
from distributed_unlearn.rounds.events import RunEvents
from distributed_unlearn.rounds.folder import output_folder
from distributed_unlearn.rounds.origin import Origin, find_origin
from distributed_unlearn.rounds.pending import complete_result, pending_result
from distributed_unlearn.rounds.state import FoundState, find_state, forget_state, has_state, job_hash, newest_state
from distributed_unlearn.workers.client import Workers


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A job whose records are read and whose base checkpoint is hashed; nothing has been started."""

    job: JobConfig
    data: PreparedData
    origin: Origin
    folder: Path
    job_sha256: str
    """See `job_hash`."""
    found: FoundState | None
    """Where an interrupted run of this job was, if the job asks to go on from there."""
    newest: tuple[str, int] | None = None
    """The newest state in the folder at the start, see `newest_state`."""
    is_done: bool = False
    """A run of this job ended with its checkpoint in place: the record is there by now, the report is to be drawn."""


@dataclass(frozen=True, eq=False)
class Session:
    """A run under way: its workers hold its corpus and see its folder."""

    run: PreparedRun
    workers: Workers
    log: RunLog
    events: RunEvents


def prepare(job: JobConfig) -> PreparedData:
    """Everything that can be refused before a weight is loaded; reads the records.

    Raises:
        ConfigError, DataError, ModelError: see the parts.
    """
    if job.train is None and not job.unlearns:
        raise ConfigError("a job without forget, rounds or train", "one of them", "say what to forget or to train")
    folder = output_folder(job.output)
    if pending_result(folder) is None:  # else it is this job's own, or `prepare_run` refuses it
        refuse_existing(folder / "checkpoint", job.overwrite)
    stage = job.cluster.zero_stage if job.train is None else job.train.stage_in(job.cluster)
    check_checkpoint(job.model, stage)
    if job.retrained is not None and job.train is None:
        reference = reference_model(job.model, job.retrained)
        check_checkpoint(reference, stage)
        require_comparable(job.model, reference, job.data.pad_token)
    if job.data.base_model is not None and job.unlearns:
        _check_base_model(job, job.data.base_model)
    if job.unlearns and isinstance(job.solver, RmuConfig):
        check_layer(job.model, job.solver)
    data = prepare_data(job.model, job.data, job.forget_rounds, job.holdout)
    if job.unlearns and isinstance(job.solver, SsdConfig):
        _check_dampening(job.solver, data.partition)
    return data


def _check_dampening(solver: SsdConfig, partition: Partition) -> None:
    """Refuse a threshold that no weight can reach: of `F` the forget set's part alone is `F_f num_forget / num_all`."""
    for index, forget in enumerate(partition.forget_rounds):
        largest = (len(forget) + len(partition.retain(index))) / len(forget)
        if solver.selection_weighting >= largest:
            raise ConfigError(
                f"solver.selection_weighting {solver.selection_weighting:g} in round {index + 1}, which forgets "
                f"1 of {largest:.4g} records: no weight can matter that much more to the forget set than to all data",
                f"a value below {largest:.4g}",
                "lower solver.selection_weighting",
            )


def _check_base_model(job: JobConfig, path: str) -> None:
    """Refuse a checkpoint before fine-tuning that cannot serve for what the job wants of it."""
    if isinstance(job.solver, RetrainConfig):
        if opened_as(job.model).adapter is not None:
            raise ConfigError(
                "solver.method retrain with an adapter",
                "a whole checkpoint: which adapter came before this one is not known",
                "train the reference by a job with train.exclude_forget, and name it as `retrained`",
            )
        base = model_to_retrain(job.model, path)
        check_checkpoint(base, job.solver.stage_in(job.cluster))
        require_comparable(job.model, base, job.data.pad_token, "data.base_model")
    elif job.objective.uses_base_model:
        check_checkpoint(reference_model(job.model, path), job.cluster.zero_stage)


def prepare_run(job: JobConfig, folder: Path, events: RunEvents) -> PreparedRun:
    """`prepare`, what a result is made from, and a state to go on from; `folder` is claimed.

    Raises:
        ConfigError, DataError, ModelError: see `prepare` and `find_state`.
    """
    left = complete_result(folder)
    data = prepare(job)
    events.prepared(job, data)
    origin = find_origin(job.model, data.commit)
    job_sha256 = job_hash(job, data, origin)
    if left is not None and left.job_sha256 == job_sha256:
        events.note("an interrupted run of this job had put its checkpoint in place; its record is completed")
        forget_state(folder)
        return PreparedRun(job, data, origin, folder, job_sha256, None, is_done=True)
    refuse_existing(folder / "checkpoint", job.overwrite)
    found = _find_state(job, folder, job_sha256, events)
    return PreparedRun(job, data, origin, folder, job_sha256, found, newest_state(folder))


def after_loss(run: PreparedRun) -> PreparedRun | None:
    """The run as it goes on after its workers were lost; None where it has saved no state since it began.

    Raises:
        DataError: the state is damaged.
    """
    newest = newest_state(run.folder)
    if newest is None or newest == run.newest:
        return None
    return replace(run, found=find_state(run.folder, run.job_sha256, run.job.cluster.num_workers), newest=newest)


def _find_state(job: JobConfig, folder: Path, job_sha256: str, events: RunEvents) -> FoundState | None:
    if not job.resume:
        if job.train is None and has_state(folder):
            events.note("an interrupted run left its state here; resume=true would go on from it")
        return None
    found = find_state(folder, job_sha256, job.cluster.num_workers)
    if found is None:
        events.note("resume: there is no state of an interrupted run, so this one starts at its first step")
    else:
        events.note(f"resume: going on after step {len(found.state.steps)} of round {found.state.round_index + 1}")
    return found


def training_records(job: JobConfig, data: PreparedData) -> np.ndarray:
    """Indices of the records that a training job trains on."""
    assert job.train is not None
    partition = data.partition
    return partition.retain(len(partition.forget_rounds) - 1) if job.train.exclude_forget else partition.training
