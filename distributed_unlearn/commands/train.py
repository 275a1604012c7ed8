"""`run` on a job with a `train` section: fine-tune on the records, or train the retrained reference."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console

from distributed_unlearn.checkpoints import package_versions, refuse_existing, require_safetensors, write_json
from distributed_unlearn.commands.job_record import finite, redacted_config
from distributed_unlearn.commands.unlearn import describe_data
from distributed_unlearn.commands.workers import open_group
from distributed_unlearn.config import JobConfig
from distributed_unlearn.data.prepare import PreparedData, prepare_data
from distributed_unlearn.records import SetScores
from distributed_unlearn.report.progress import TrainingProgress
from distributed_unlearn.report.run_log import RunLog
from distributed_unlearn.rounds.evaluate import evaluate_sets
from distributed_unlearn.rounds.training import TrainingTask, run_training


def prepare_training(job: JobConfig) -> PreparedData:
    """Everything that can be refused before a weight is loaded.

    Raises:
        ConfigError, DataError, ModelError: see the parts.
    """
    refuse_existing(Path(job.output) / "checkpoint", job.overwrite)
    require_safetensors(job.model.path)
    return prepare_data(job.model, job.data, job.forget_rounds, job.holdout)


def training_records(job: JobConfig, prepared: PreparedData) -> np.ndarray:
    """Indices of the records that the job trains on."""
    assert job.train is not None
    partition = prepared.partition
    return partition.retain(len(partition.forget_rounds) - 1) if job.train.exclude_forget else partition.training


def training_stage(job: JobConfig) -> int:
    """ZeRO stage of the training: its own, else the cluster's."""
    assert job.train is not None
    return job.cluster.zero_stage if job.train.zero_stage is None else job.train.zero_stage


def run_training_job(job: JobConfig, console: Console) -> None:
    """Train, score and write the checkpoint.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    assert job.train is not None
    folder = Path(job.output)
    prepared = prepare_training(job)
    console.print(describe_data(prepared), markup=False, highlight=False)
    partition, indices = prepared.partition, training_records(job, prepared)
    progress = TrainingProgress(console, "training")
    with open_group(job.cluster) as group, RunLog(folder) as log:
        group.call_all("set_corpus", group.share(prepared.corpus))

        def on_step(step: int, loss: float) -> None:
            progress.update(step, loss)
            log.log("train", step, {"loss_nats_per_token": loss})

        try:
            losses = run_training(
                group,
                TrainingTask(
                    model=job.model,
                    train=job.train,
                    indices=indices,
                    zero_stage=training_stage(job),
                    micro_batch_size=job.curvature.micro_batch_size,
                    seed=job.solver.seed,
                    destination=folder / "checkpoint",
                    save=job.save,
                    overwrite=job.overwrite,
                    on_start=progress.start,
                    on_step=on_step,
                ),
            )
        finally:
            progress.stop()
        sets = {"trained on": indices, "holdout": partition.holdout}
        if len(partition.forget_rounds):
            sets["forget"] = partition.forget_rounds[0]
        scores, _ = evaluate_sets(group, sets, 2 * job.curvature.micro_batch_size)
    _write_record(folder, job, len(indices), losses, scores)
    for name, value in scores.items():
        console.print(
            f"{name}: loss {value.loss_nats_per_token:.4f} nats per token, exact memorisation "
            f"{value.exact_memorisation:.4f} ({value.num_records} records)",
            markup=False,
            highlight=False,
        )
    console.print(f"checkpoint: {folder / 'checkpoint'}", markup=False, highlight=False, soft_wrap=True)


def _write_record(
    folder: Path, job: JobConfig, num_records: int, losses: list[float], scores: dict[str, SetScores]
) -> None:
    record = {
        "format": 1,
        "config": redacted_config(job),
        "versions": package_versions(),
        "num_records": num_records,
        "num_steps": len(losses),
        "last_loss_nats_per_token": losses[-1],
        "scores": {name: asdict(value) for name, value in scores.items()},
    }
    write_json(folder / "record.json", finite(record))
