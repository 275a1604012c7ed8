"""A training job on workers: fine-tuning, or the retrained reference; the checkpoint, its record, its scores."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from distributed_unlearn.data.selection import Partition
from distributed_unlearn.files import complete_folder
from distributed_unlearn.provenance import hash_folder
from distributed_unlearn.records import RunRecord, TrainingRecord
from distributed_unlearn.rounds.evaluate import evaluate_sets
from distributed_unlearn.rounds.origin import model_to_open
from distributed_unlearn.rounds.pending import PendingResult, write_record
from distributed_unlearn.rounds.preparation import Session, training_records
from distributed_unlearn.rounds.result import begin_record, result_mark, result_papers
from distributed_unlearn.rounds.retraining import train_steps, training_spec


def train(session: Session) -> RunRecord:
    """Train, write checkpoint and record, score; the record is written anew with the scores once there are some.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    job, data, workers = session.run.job, session.run.data, session.workers
    indices = training_records(job, data)
    started = time.monotonic()
    losses = _take_steps(session, indices)
    assert job.train is not None
    partition = data.partition
    erased = partition.forget_rounds if job.train.exclude_forget else ()
    training = TrainingRecord(len(indices), len(losses), losses[-1], time.monotonic() - started, None)
    pending = _write_checkpoint(session, erased, training)
    record = pending.record
    write_record(session.run.folder, record, pending.salt)
    scores, _ = evaluate_sets(workers, _sets(partition, indices), job.curvature.scoring_batch)
    record = replace(record, training=replace(training, scores=scores))
    write_record(session.run.folder, record, None)  # the salt is there
    return record


def _take_steps(session: Session, indices: np.ndarray) -> list[float]:
    """Train and leave the trained model open on the workers; the loss of every step, nats per token."""
    job, workers = session.run.job, session.workers
    assert job.train is not None
    model = model_to_open(job.model, session.run.data.commit)
    plan = workers.begin_training(training_spec(job, model, job.train, indices))
    losses = train_steps(session, plan)
    workers.finish_training()
    return losses


def _write_checkpoint(session: Session, erased: Sequence[np.ndarray], training: TrainingRecord) -> PendingResult:
    """Write the trained model; returns its papers, which were announced before it took its place."""
    job, folder = session.run.job, session.run.folder
    model = model_to_open(job.model, session.run.data.commit)
    with complete_folder(folder / "checkpoint", job.overwrite, result_papers(folder)) as staging:
        session.workers.export(str(staging.resolve()), model, job.save)
        result_mark(session.run, erased).write(staging)
        record, salt = begin_record("training", session.run, hash_folder(staging), erased)
        pending = PendingResult(session.run.job_sha256, replace(record, training=training), salt)
        pending.write(folder)
    return pending


def _sets(partition: Partition, indices: np.ndarray) -> Mapping[str, np.ndarray]:
    """What is scored after a training: with a forget set also the sets of an unlearning, to compare with."""
    rounds = partition.forget_rounds
    sets = {"trained_on": indices, "holdout": partition.holdout}
    sets |= {f"erased_before_{index + 1}": erased for index, erased in enumerate(partition.erased_before)}
    if not rounds:
        return sets
    sets["retain"] = partition.retain(len(rounds) - 1)
    if len(rounds) == 1:
        return {**sets, "forget": rounds[0]}
    return {**sets, **{f"forget_round_{index + 1}": forget for index, forget in enumerate(rounds)}}
