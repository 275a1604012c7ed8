"""`run` on a job that forgets: rounds on a worker group, the checkpoint, the record."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from distributed_unlearn.commands.job_record import (
    SURVIVAL_WARNING_LEVEL,
    card_lines,
    erased_before,
    model_to_open,
    result_mark,
    result_papers,
    write_pictures,
    write_result_record,
)
from distributed_unlearn.commands.output import claimed, output_folder
from distributed_unlearn.commands.started import Run, started
from distributed_unlearn.config import JobConfig, ModelConfig
from distributed_unlearn.data.erased import num_learned_again
from distributed_unlearn.data.prepare import PreparedData, prepare_data
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.evaluation.metrics import tug_of_war
from distributed_unlearn.files import complete_folder, expand_home, refuse_existing
from distributed_unlearn.models.checkpoint import require_safetensors
from distributed_unlearn.provenance import hash_folder
from distributed_unlearn.records import RoundRecord, SetScores, StepRecord
from distributed_unlearn.report.card import model_card
from distributed_unlearn.report.progress import RoundProgress, stage
from distributed_unlearn.report.tables import MethodRow, comparison_table
from distributed_unlearn.rounds.evaluate import evaluate_sets
from distributed_unlearn.rounds.round import RoundTask, run_round

_DAMAGE_NATS = 0.5
"""Rise of the retain loss, nats per token, above which the result is called damaged."""


def prepare_job(job: JobConfig) -> PreparedData:
    """Everything that can be refused before a weight is loaded.

    Raises:
        ConfigError, DataError, ModelError: see the parts.
    """
    if not job.unlearns:
        raise ConfigError("a job without forget, rounds or train", "one of them", "say what to forget or to train")
    refuse_existing(output_folder(job.output) / "checkpoint", job.overwrite)
    require_safetensors(job.model.path)
    if job.retrained is not None:
        require_safetensors(job.retrained)
    return prepare_data(job.model, job.data, job.forget_rounds, job.holdout)


def describe_data(prepared: PreparedData) -> str:
    """Counts of the partition, in one line."""
    partition, report = prepared.partition, prepared.report
    rounds = ", ".join(str(len(forget)) for forget in partition.forget_rounds)
    text = (
        f"records: {len(partition.training)} trained on, to forget {rounds or 'none'}, "
        f"held out {len(partition.holdout)}, longest {report.longest} tokens"
    )
    if report.num_truncated or report.num_dropped:
        text += f"; {report.num_truncated} truncated, {report.num_dropped} dropped"
    before = erased_before(prepared)
    return text if before is None else f"{text}; {before}"


@dataclass(frozen=True)
class _Outcome:
    """What is left to show once the workers are gone."""

    rounds: list[RoundRecord]
    reference: dict[str, SetScores] | None
    survival: Any
    mode: Any


def run_unlearning(job: JobConfig, console: Console) -> None:
    """Run all rounds of a job and write its result.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    folder = output_folder(job.output)
    with claimed(folder):
        prepared = prepare_job(job)
        console.print(describe_data(prepared), markup=False, highlight=False, soft_wrap=True)
        warn_of_reference(job, prepared, console)
        _warn_of_samples(job, prepared, console)
        with started(job, prepared, folder, console) as run:
            found = _unlearn(run)
        _warn_of_rounding(found.survival, console)
        _warn_of_damage(found.rounds[-1], console)
        rows = _rows(found.rounds, found.reference)
        write_pictures(folder, f"Unlearning run {folder.name}", describe_data(prepared), found.rounds, rows)
    console.print(comparison_table(rows))
    _print_end(console, folder, found.rounds, found.survival, found.mode)


def _unlearn(run: Run) -> _Outcome:
    """All rounds, the checkpoint and its record, while the workers live: ending them can fail."""
    job, prepared, workers, console = run.job, run.prepared, run.workers, run.console
    reference = _score_reference(run)
    model = model_to_open(job.model, prepared.commit)
    with stage(console, f"loading {job.model.path} at ZeRO stage {job.cluster.zero_stage}"):
        facts = workers.open_model(model, job.model.dtype, job.cluster.zero_stage)
    if facts.segment_fallback is not None:
        reason = facts.segment_fallback
        console.print(f"warning: the whole model is one segment: {reason}", style="yellow", markup=False)
    run.log.log("model", 0, asdict(facts))
    rounds = _run_rounds(run, reference)
    mode = workers.curvature_mode()
    reference_json = None if reference is None else {name: asdict(scores) for name, scores in reference.items()}
    with stage(console, "writing and reading back the checkpoint"):
        survival, files = _write_checkpoint(run, model, rounds)
        write_result_record(
            run.folder,
            job,
            run.origin,
            prepared,
            rounds,
            survival,
            files,
            mode,
            reference_json,
        )
    run.log.log("surviving_update", 0, asdict(survival))
    return _Outcome(rounds, reference, survival, mode)


def warn_of_reference(job: JobConfig, prepared: PreparedData, console: Console) -> None:
    """Say where a retrained reference, by its own record, was not trained without what is erased."""
    if job.retrained is None:
        return
    partition, path = prepared.partition, Path(expand_home(job.retrained))
    erased = np.concatenate([*partition.forget_rounds, prepared.erased.indices])
    ids = sorted({prepared.corpus.record_ids[int(index)] for index in erased})
    known = num_learned_again(path, ids) if path.is_dir() else None
    if known:
        console.print(
            f"warning: the record of the retrained reference does not leave out {known} of {len(ids)} erased records: "
            "unless they were not in its data, the Tug-of-War compares with a model that knows them.",
            style="yellow",
            markup=False,
        )


def _samples(job: JobConfig, prepared: PreparedData) -> bool:
    """Whether the sets of the last round are scored by samples of them."""
    limit = job.evaluation.max_records_per_set
    last = _sets(prepared, len(prepared.partition.forget_rounds) - 1)
    return limit is not None and any(len(indices) > limit for indices in last.values())


def _warn_of_samples(job: JobConfig, prepared: PreparedData, console: Console) -> None:
    if job.retrained is not None and _samples(job, prepared):
        console.print(
            "warning: evaluation.max_records_per_set scores samples, while the retrained reference is scored on whole "
            "sets: the Tug-of-War is left out. Set it to null to have it.",
            style="yellow",
        )


def _sets(prepared: PreparedData, round_index: int) -> dict[str, np.ndarray]:
    partition = prepared.partition
    return {
        "forget": partition.forget_rounds[round_index],
        "retain": partition.retain(round_index),
        "holdout": partition.holdout,
    }


def _score_reference(run: Run) -> dict[str, SetScores] | None:
    """The retrained model's scores on the sets of the last round, if the job names one."""
    job, prepared, workers = run.job, run.prepared, run.workers
    if job.retrained is None:
        return None
    with stage(run.console, f"scoring the retrained reference {job.retrained}"):
        model = job.model.model_copy(update={"path": expand_home(job.retrained), "revision": None})
        workers.open_model(model, job.model.dtype, job.cluster.zero_stage)
        last = len(prepared.partition.forget_rounds) - 1
        return evaluate_sets(workers, _sets(prepared, last), 2 * job.curvature.micro_batch_size)[0]


def _run_rounds(run: Run, reference: dict[str, SetScores] | None) -> list[RoundRecord]:
    job, prepared, console = run.job, run.prepared, run.console
    rounds: list[RoundRecord] = []
    num_rounds = len(prepared.partition.forget_rounds)
    for index in range(num_rounds):
        sets = _sets(prepared, index)
        with RoundProgress(console, job.solver.max_steps, f"round {index + 1}/{num_rounds}") as progress:

            def on_step(
                record: StepRecord, extra: dict[str, float], progress: RoundProgress = progress, index: int = index
            ) -> None:
                progress.update(record, extra)
                run.log.log(f"round_{index}/step", record.step, {**asdict(record), **extra})

            record = run_round(
                run.workers,
                RoundTask(
                    round_index=index,
                    forget=sets["forget"],
                    retain=sets["retain"],
                    holdout=sets["holdout"],
                    objective=job.objective,
                    solver=job.solver,
                    curvature=job.curvature,
                    earlier_forget=prepared.partition.forget_rounds[:index],
                    erased_before=prepared.partition.erased_before,
                    max_evaluated_records=job.evaluation.max_records_per_set,
                    on_step=on_step,
                ),
            )
        if reference is not None and index == num_rounds - 1 and not _samples(job, prepared):
            keys = tuple(name for name in ("forget", "retain", "holdout") if name in reference)
            record = replace(record, tug_of_war=tug_of_war(record.after, reference, keys))
        run.log.log("round", index, {k: v for k, v in asdict(record).items() if k != "steps"})
        console.print(f"round {index + 1}: {record.stop_reason}", markup=False, highlight=False)
        rounds.append(record)
    return rounds


def _write_checkpoint(run: Run, model: ModelConfig, rounds: Sequence[RoundRecord]) -> tuple[Any, dict[str, str]]:
    """Write the checkpoint; returns what survives in it and the hashes of its files."""
    job, folder = run.job, run.folder
    with complete_folder(folder / "checkpoint", job.overwrite, result_papers(folder)) as staging:
        survival = run.workers.export(str(staging.resolve()), model, job.save)
        (staging / "README.md").write_text(
            model_card(job.model.path, card_lines(rounds, survival, run.prepared)), encoding="utf-8"
        )
        result_mark(run.origin, run.prepared, run.prepared.partition.forget_rounds).write(staging)
        return survival, hash_folder(staging)  # hashed before it is in place: its record follows at once


def _warn_of_rounding(survival: Any, console: Console) -> None:
    if survival.projection < SURVIVAL_WARNING_LEVEL:
        console.print(
            f"WARNING: only {survival.projection:.1%} of the update survives the saved dtype {survival.dtype}: the "
            "checkpoint on disk has not forgotten what the fp32 weights have. Set save.dtype=float32, or "
            "save.fp32_master=true to keep the fp32 weights beside it.",
            style="bold red",
        )


def _warn_of_damage(last: RoundRecord, console: Console) -> None:
    before, after = (scores["retain"].loss_nats_per_token for scores in (last.before, last.after))
    if not after <= before + _DAMAGE_NATS:
        console.print(
            f"WARNING: the loss on the retain set rose from {before:.3f} to {after:.3f} nats per token in the last "
            "round: the model has lost part of what it should keep. Raise solver.max_steps, so that the round can win "
            "it back; or lower solver.learning_rate, if the method is a first-order one.",
            style="bold red",
        )


def _rows(rounds: Sequence[RoundRecord], reference: dict[str, SetScores] | None) -> list[MethodRow]:
    rows: list[MethodRow] = []
    for record in rounds:
        # Each round has a forget and a retain set of its own, so each has a state before it to compare with.
        which = "" if len(rounds) == 1 else f" round {record.round_index + 1}"
        before = None
        if reference is not None and record.tug_of_war is not None:
            before = tug_of_war(record.before, reference, tuple(reference))
        rows.append(MethodRow(f"before{which}", record.before, before, None, None))
        after = (record.tug_of_war, record.wall_seconds, record.num_products)
        rows.append(MethodRow(f"after{which}", record.after, *after))
    if reference is not None:
        rows.append(MethodRow("retrained", reference, 1.0, None, None))
    return rows


def _print_end(console: Console, folder: Path, rounds: Sequence[RoundRecord], survival: Any, mode: Any) -> None:
    steps = sum(record.num_steps for record in rounds)
    products = sum(record.num_products for record in rounds)
    seconds = sum(record.wall_seconds for record in rounds)
    kept = "first-order: none" if mode.cached is None else ("cached" if mode.cached else "recompute")
    console.print(
        f"{len(rounds)} round(s), {steps} steps, {products} curvature products ({kept}) in {seconds:.1f} s; "
        f"{survival.projection:.1%} of the update survives {survival.dtype}",
        markup=False,
        highlight=False,
    )
    console.print(f"checkpoint: {folder / 'checkpoint'}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"record:     {folder / 'record.json'}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report:     {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
