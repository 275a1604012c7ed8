"""`run`: unlearn, or train where the job has a `train` section; prints what happens and how it ended."""

from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from distributed_unlearn.cluster.open import open_group
from distributed_unlearn.commands.console_events import ConsoleEvents, print_line
from distributed_unlearn.config import JobConfig
from distributed_unlearn.records import RoundRecord, RunRecord, SurvivingUpdate
from distributed_unlearn.report.tables import comparison_table
from distributed_unlearn.rounds.events import RunEvents
from distributed_unlearn.rounds.folder import claimed, output_folder
from distributed_unlearn.rounds.preparation import prepare_run
from distributed_unlearn.rounds.result import Report, write_report
from distributed_unlearn.rounds.session import run_session
from distributed_unlearn.workers.group import WorkerGroup

SURVIVAL_WARNING_LEVEL = 0.9
"""Share of the update below which the saved dtype counts as having undone part of the unlearning."""
_DAMAGE_NATS = 0.5
"""Rise of the retain loss, nats per token, above which the result is called damaged."""


def run_job(job: JobConfig, events: RunEvents, group: WorkerGroup | None = None) -> Report:
    """Run a job in its output folder and draw its report.

    Args:
        job: What to do.
        events: What is told as it happens.
        group: Open workers to run on, which stay open; None: those that the job's `cluster` asks for.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    folder = output_folder(job.output)
    with claimed(folder):
        run = prepare_run(job, folder, events)
        opened: AbstractContextManager[WorkerGroup] = open_group(job.cluster) if group is None else nullcontext(group)
        with opened as workers:
            run_session(workers, run, events)
        return write_report(folder)


def run_command(job: JobConfig, console: Console) -> None:
    """`run_job`, with all that there is to see on the console.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    report = run_job(job, ConsoleEvents(console))
    folder = output_folder(job.output)
    if report.record.kind == "training":
        _print_training(console, report.record)
    else:
        _warn_of_rounding(report.record, console)
        _warn_of_damage(report.record.rounds[-1], console)
        console.print(comparison_table(report.rows))
        _print_end(console, report.record)
    for name, path in (("checkpoint", "checkpoint"), ("record", "record.json"), ("report", "report.html")):
        if (folder / path).exists():
            print_line(console, f"{name + ':':<11} {folder / path}")


def _print_training(console: Console, record: RunRecord) -> None:
    assert record.training is not None and record.training.scores is not None
    for name, value in record.training.scores.items():
        print_line(
            console,
            f"{name}: loss {value.loss_nats_per_token:.4f} nats per token, exact memorisation "
            f"{value.exact_memorisation:.4f} ({value.num_records} records)",
        )


def _warn_of_rounding(record: RunRecord, console: Console) -> None:
    survival = _survival(record)
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


def _survival(record: RunRecord) -> SurvivingUpdate:
    assert record.surviving_update is not None
    return record.surviving_update


def _print_end(console: Console, record: RunRecord) -> None:
    steps = sum(item.num_steps for item in record.rounds)
    products = sum(item.num_products for item in record.rounds)
    seconds = sum(item.wall_seconds for item in record.rounds)
    survival, mode = _survival(record), record.curvature_mode
    cached = None if mode is None else mode.cached
    kept = "first-order: none" if cached is None else ("cached" if cached else "recompute")
    print_line(
        console,
        f"{len(record.rounds)} round(s), {steps} steps, {products} curvature products ({kept}) in {seconds:.1f} s; "
        f"{survival.projection:.1%} of the update survives {survival.dtype}",
    )
