"""An unlearning job on workers: the reference, all rounds, the checkpoint and its record."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from distributed_unlearn.config import JobConfig, ModelConfig, RetrainConfig, SsdConfig, SteppingConfig
from distributed_unlearn.data.prepare import PreparedData
from distributed_unlearn.errors import ModelError
from distributed_unlearn.evaluation.metrics import tug_of_war
from distributed_unlearn.files import complete_folder
from distributed_unlearn.models.base_of_adapter import reference_model
from distributed_unlearn.provenance import hash_folder
from distributed_unlearn.records import RoundRecord, RunRecord, SetScores, StepRecord, SurvivingUpdate, run_verdict
from distributed_unlearn.report.card import model_card
from distributed_unlearn.rounds.dampening import run_dampened_round
from distributed_unlearn.rounds.evaluate import Scores, evaluate_sets, evidence
from distributed_unlearn.rounds.opening import Unseen
from distributed_unlearn.rounds.origin import model_to_open
from distributed_unlearn.rounds.pending import PendingResult, write_record
from distributed_unlearn.rounds.preparation import Session
from distributed_unlearn.rounds.result import begin_record, card_lines, result_mark, result_papers
from distributed_unlearn.rounds.retraining import run_retrained_round
from distributed_unlearn.rounds.round import RoundTask, run_round, score_start
from distributed_unlearn.rounds.state import RoundKeeper, StateKeeper, forget_state
from distributed_unlearn.workers.evidence import PredictionEvidence

_COMPARED = ("forget", "retain", "holdout")


def unlearn(session: Session) -> RunRecord:
    """All rounds, the checkpoint and its record, while the workers live: ending them can fail.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    job, data, workers = session.run.job, session.run.data, session.workers
    reference = _score_reference(session)
    base = _score_base(session)
    model = model_to_open(job.model, data.commit)
    with session.events.stage(f"loading {job.model.path} at ZeRO stage {job.cluster.zero_stage}"):
        facts = workers.open_model(model, job.model.dtype, job.cluster.zero_stage)
    session.events.opened(facts)
    session.log.log("model", 0, asdict(facts))
    rounds = _run_rounds(session, reference, base)
    with session.events.stage("writing and reading back the checkpoint"):
        pending, survival = _write_checkpoint(session, model, rounds, reference)
        write_record(session.run.folder, pending.record, pending.salt)
        forget_state(session.run.folder)  # complete: nothing to go on with
    session.log.log("surviving_update", 0, asdict(survival))
    return pending.record


def scores_samples(job: JobConfig, data: PreparedData) -> bool:
    """Whether the sets of the last round are scored by samples of them."""
    limit = job.evaluation.max_records_per_set
    last = _sets(data, len(data.partition.forget_rounds) - 1)
    return limit is not None and any(len(indices) > limit for indices in last.values())


def _sets(data: PreparedData, round_index: int) -> dict[str, np.ndarray]:
    partition = data.partition
    return {
        "forget": partition.forget_rounds[round_index],
        "retain": partition.retain(round_index),
        "holdout": partition.holdout,
    }


def _score_reference(session: Session) -> dict[str, SetScores] | None:
    """The retrained model's scores on the sets of the last round, if the job names one."""
    job, data, workers = session.run.job, session.run.data, session.workers
    if job.retrained is None:
        return None
    with session.events.stage(f"scoring the retrained reference {job.retrained}"):
        model = reference_model(job.model, job.retrained)
        workers.open_model(model, job.model.dtype, job.cluster.zero_stage)
        last = len(data.partition.forget_rounds) - 1
        return evaluate_sets(workers, _sets(data, last), job.curvature.scoring_batch)[0]


def _score_base(session: Session) -> PredictionEvidence | None:
    """The forget sets' tokens by the checkpoint before fine-tuning, if the objective takes its targets from there.

    Raises:
        ModelError: a checkpoint with another vocabulary.
    """
    job, data, workers = session.run.job, session.run.data, session.workers
    if job.data.base_model is None or not job.objective.uses_base_model:
        return None
    with session.events.stage(f"scoring the base model {job.data.base_model}"):
        model = reference_model(job.model, job.data.base_model)
        facts = workers.open_model(model, job.model.dtype, job.cluster.zero_stage)
        largest = data.corpus.largest_token_id
        if largest is not None and facts.vocab_size is not None and largest >= facts.vocab_size:
            raise ModelError(
                f"a token id {largest} in the records and a base model of {facts.vocab_size} tokens",
                "the checkpoint that was fine-tuned, with the same tokenizer",
                "correct data.base_model, or take objective.target_from holdout",
            )
        return evidence(workers, np.concatenate(data.partition.forget_rounds), job.curvature.scoring_batch)


def _run_rounds(
    session: Session, reference: dict[str, SetScores] | None, base: PredictionEvidence | None
) -> list[RoundRecord]:
    job, data = session.run.job, session.run.data
    keeper = StateKeeper(session.run.folder, job.save, session.run.job_sha256, session.workers)
    found = session.run.found
    rounds = [] if found is None else list(found.state.rounds)
    tasks = [_task(session, index) for index in range(len(data.partition.forget_rounds))]
    with session.events.stage("scoring all sets at the start of the job"):
        start = score_start(session.workers, tasks)
        unseen = _unseen(session, base)
    for record in rounds:
        _tell(session, record)
    for index, task in enumerate(tasks[len(rounds) :], start=len(rounds)):
        ours = found if found is not None and found.state.round_index == index else None
        record = _run_round(session, task, start, unseen, len(tasks), RoundKeeper(keeper, index, tuple(rounds), ours))
        if reference is not None and index == len(tasks) - 1 and not scores_samples(job, data):
            keys = tuple(name for name in _COMPARED if name in reference)
            record = replace(record, tug_of_war=tug_of_war(record.after, reference, keys))
        _tell(session, record)
        rounds.append(record)
    return rounds


def _tell(session: Session, record: RoundRecord) -> None:
    session.log.log("round", record.round_index + 1, {k: v for k, v in asdict(record).items() if k != "steps"})
    session.events.round_ended(record)


def _task(session: Session, index: int) -> RoundTask:
    job, partition = session.run.job, session.run.data.partition
    return RoundTask(
        round_index=index,
        **_sets(session.run.data, index),
        objective=job.objective,
        solver=job.solver,
        curvature=job.curvature,
        earlier_forget=partition.forget_rounds[:index],
        erased_before=partition.erased_before,
        max_evaluated_records=job.evaluation.max_records_per_set,
    )


def _unseen(session: Session, base: PredictionEvidence | None) -> Unseen:
    """The holdout set's tokens, where an objective or a stopping rule over tokens reads them."""
    job, holdout = session.run.job, session.run.data.partition.holdout
    if not job.objective.uses_log_odds or not len(holdout):
        return Unseen(base=base)
    return Unseen(evidence(session.workers, holdout, job.curvature.scoring_batch), base)


def _run_round(
    session: Session, task: RoundTask, start: Scores, unseen: Unseen, num_rounds: int, keeper: RoundKeeper
) -> RoundRecord:
    log = session.log
    if isinstance(task.solver, RetrainConfig):
        return run_retrained_round(session, task, start)
    if isinstance(task.solver, SsdConfig):
        return run_dampened_round(session, task, start)
    with session.events.round(task.round_index, num_rounds, task.stepping.max_steps) as tell:

        def on_step(record: StepRecord, measured: Mapping[str, float]) -> None:
            log.log(f"round_{task.round_index + 1}/step", record.step, {**asdict(record), **measured})
            tell(record, measured)

        keeper.restore_start(session.workers)
        return run_round(session.workers, task, start, unseen, keeper, on_step)


def _write_checkpoint(
    session: Session, model: ModelConfig, rounds: Sequence[RoundRecord], reference: dict[str, SetScores] | None
) -> tuple[PendingResult, SurvivingUpdate]:
    """Write the checkpoint; returns its papers, which were announced before it took its place, and what survives."""
    job, data, folder, workers = session.run.job, session.run.data, session.run.folder, session.workers
    mode = workers.curvature_mode() if isinstance(job.solver, SteppingConfig) else None
    erased = data.partition.forget_rounds
    with complete_folder(folder / "checkpoint", job.overwrite, result_papers(folder)) as staging:
        survival = workers.export(str(staging.resolve()), model, job.save)
        lines = card_lines(rounds, survival, data.erased)
        (staging / "README.md").write_text(model_card(job.model.path, lines), encoding="utf-8")
        result_mark(session.run, erased).write(staging)
        # Hashed before it is in place: afterwards its files may change.
        record, salt = begin_record("unlearning", session.run, hash_folder(staging), erased)
        record = replace(
            record,
            verdict=run_verdict(rounds[-1].verdict, survival),
            rounds=tuple(rounds),
            surviving_update=survival,
            curvature_mode=mode,
            retrained=reference,
        )
        pending = PendingResult(session.run.job_sha256, record, salt)
        pending.write(folder)
    return pending, survival
