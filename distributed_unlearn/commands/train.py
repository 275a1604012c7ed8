"""`run` on a job with a `train` section: fine-tune on the records, or train the retrained reference."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from distributed_unlearn.commands.job_record import (
    Origin,
    erasure_fields,
    finite,
    model_to_open,
    redacted_config,
    result_mark,
    result_papers,
)
from distributed_unlearn.commands.output import claimed, output_folder
from distributed_unlearn.commands.started import Run, started
from distributed_unlearn.commands.unlearn import describe_data
from distributed_unlearn.config import JobConfig
from distributed_unlearn.data.prepare import PreparedData, prepare_data
from distributed_unlearn.files import refuse_existing, write_json, write_private
from distributed_unlearn.models.checkpoint import require_safetensors
from distributed_unlearn.records import SetScores
from distributed_unlearn.report.progress import TrainingProgress
from distributed_unlearn.rounds.evaluate import evaluate_sets
from distributed_unlearn.rounds.training import TrainingTask, run_training, write_trained
from distributed_unlearn.workers.messages import TrainingSpec


def prepare_training(job: JobConfig) -> PreparedData:
    """Everything that can be refused before a weight is loaded.

    Raises:
        ConfigError, DataError, ModelError: see the parts.
    """
    refuse_existing(output_folder(job.output) / "checkpoint", job.overwrite)
    require_safetensors(job.model.path)
    return prepare_data(job.model, job.data, job.forget_rounds, job.holdout)


def training_records(job: JobConfig, prepared: PreparedData) -> np.ndarray:
    """Indices of the records that the job trains on."""
    assert job.train is not None
    partition = prepared.partition
    return partition.retain(len(partition.forget_rounds) - 1) if job.train.exclude_forget else partition.training


def run_training_job(job: JobConfig, console: Console) -> None:
    """Train, score and write the checkpoint.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    folder = output_folder(job.output)
    with claimed(folder):
        prepared = prepare_training(job)
        console.print(describe_data(prepared), markup=False, highlight=False, soft_wrap=True)
        with started(job, prepared, folder, console) as run:
            scores = _train(run)
    for name, value in scores.items():
        console.print(
            f"{name}: loss {value.loss_nats_per_token:.4f} nats per token, exact memorisation "
            f"{value.exact_memorisation:.4f} ({value.num_records} records)",
            markup=False,
            highlight=False,
        )
    console.print(f"checkpoint: {folder / 'checkpoint'}", markup=False, highlight=False, soft_wrap=True)


def _train(run: Run) -> dict[str, SetScores]:
    """Train, write checkpoint and record, score; the record is written anew with the scores once there are some."""
    job, prepared, workers, folder = run.job, run.prepared, run.workers, run.folder
    assert job.train is not None
    indices = training_records(job, prepared)
    progress = TrainingProgress(run.console, "training")

    def on_step(step: int, loss: float) -> None:
        progress.update(step, loss)
        run.log.log("train", step, {"loss_nats_per_token": loss})

    task = TrainingTask(
        spec=TrainingSpec(
            model=model_to_open(job.model, prepared.commit),
            train=job.train,
            indices=indices,
            zero_stage=job.train.stage_in(job.cluster),
            micro_batch_size=job.curvature.micro_batch_size,
            seed=job.solver.seed,
        ),
        destination=folder / "checkpoint",
        save=job.save,
        overwrite=job.overwrite,
        on_start=progress.start,
        on_step=on_step,
    )
    try:
        losses = run_training(workers, task)
    finally:
        progress.stop()
    erased = prepared.partition.forget_rounds if job.train.exclude_forget else ()
    files = write_trained(workers, task, result_papers(folder), result_mark(run.origin, prepared, erased))
    erasure, salt = erasure_fields(prepared, erased)
    if salt is not None:
        write_private(folder / "record.salt", salt)
    _write_record(folder, job, run.origin, files, erasure, len(indices), losses, None)
    sets = {"trained on": indices, "holdout": prepared.partition.holdout, **_forget_sets(prepared)}
    scores, _ = evaluate_sets(workers, sets, 2 * job.curvature.micro_batch_size)
    _write_record(folder, job, run.origin, files, erasure, len(indices), losses, scores)
    return scores


def _write_record(
    folder: Path,
    job: JobConfig,
    origin: Origin,
    files: dict[str, str],
    erasure: dict[str, Any],
    num_records: int,
    losses: list[float],
    scores: dict[str, SetScores] | None,
) -> None:
    record = {
        "format": 1,
        "config": redacted_config(job),
        "versions": origin.versions,
        "base": origin.base,
        "result": {"id": origin.result, "files": files},
        **erasure,
        "num_records": num_records,
        "num_steps": len(losses),
        "last_loss_nats_per_token": losses[-1],
        "scores": None if scores is None else {name: asdict(value) for name, value in scores.items()},
    }
    write_json(folder / "record.json", finite(record))


def _forget_sets(prepared: PreparedData) -> dict[str, np.ndarray]:
    """`forget`, of several rounds `forget_round_<k>` for each; `erased_before_<k>` for each round of earlier jobs."""
    rounds = prepared.partition.forget_rounds
    earlier = {f"erased_before_{index}": erased for index, erased in enumerate(prepared.partition.erased_before)}
    if len(rounds) == 1:
        return {"forget": rounds[0], **earlier}
    return {**{f"forget_round_{index}": forget for index, forget in enumerate(rounds)}, **earlier}
