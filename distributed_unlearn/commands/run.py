"""`run`: unlearn, or train where the job has a `train` section; prints what happens and how it ended."""

from rich.console import Console

from distributed_unlearn.cluster.open import open_group
from distributed_unlearn.commands.console_events import ConsoleEvents, print_line
from distributed_unlearn.commands.observed_events import ObservedEvents, Queue
from distributed_unlearn.config import JobConfig
from distributed_unlearn.errors import WorkerError
from distributed_unlearn.logs import use_json_lines
from distributed_unlearn.records import RunRecord, SurvivingUpdate
from distributed_unlearn.records.verdict import SURVIVAL_LEVEL, UNKNOWN
from distributed_unlearn.report.tables import comparison_table
from distributed_unlearn.rounds.events import RunEvents, Unwatched
from distributed_unlearn.rounds.folder import claimed, output_folder
from distributed_unlearn.rounds.pending import settle
from distributed_unlearn.rounds.preparation import PreparedRun, after_loss, prepare_run
from distributed_unlearn.rounds.report import Report, write_report
from distributed_unlearn.rounds.session import run_session
from distributed_unlearn.workers.group import WorkerGroup


def run_job(
    job: JobConfig, events: RunEvents | None = None, group: WorkerGroup | None = None, queue: Queue | None = None
) -> Report:
    """Run a job in its output folder and draw its report.

    Args:
        job: What to do.
        events: What is told as it happens; None: nobody.
        group: Open workers to run on, which stay open; None: those that the job's `cluster` asks for.
        queue: Asked now and then for the service's queue, which is exported beside the run's metrics.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    folder = output_folder(job.output)
    if job.cluster.log_format == "json":
        use_json_lines(rank=None)
    with claimed(folder):
        watcher = ObservedEvents(Unwatched() if events is None else events, queue)
        run = prepare_run(job, folder, watcher)
        if group is not None and not run.is_done:
            run_session(group, run, watcher)
        elif not run.is_done:
            _run_on_own_workers(run, watcher)
        report = write_report(folder)
        settle(folder)
        return report


def _run_on_own_workers(run: PreparedRun, events: RunEvents) -> None:
    """Run on workers that the job's `cluster` asks for, and on new ones where some were lost and a state was saved.

    Raises:
        WorkerError: a worker raised an error; or some were lost `cluster.max_restarts` times before, or at the same
            step again.
        UserError: anything else that the user can act on; nothing is left half-written.
    """
    cluster, restarts = run.job.cluster, 0
    while True:
        try:
            with open_group(cluster) as workers:
                run_session(workers, run, events)
            return
        except WorkerError as error:
            going_on = None if error.raised or restarts == cluster.max_restarts else after_loss(run)
            if going_on is None or going_on.found is None:
                raise
            run, restarts, steps = going_on, restarts + 1, len(going_on.found.state.steps)
            events.note(
                f"{error.got}: restart {restarts} of {cluster.max_restarts}, on new workers, after step {steps}"
            )


def run_command(job: JobConfig, console: Console) -> bool:
    """`run_job`, with all that there is to see on the console.

    Returns:
        False where the verdict is not that everything is forgotten and the retain set kept.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    report = run_job(job, ConsoleEvents(console))
    folder = output_folder(job.output)
    if report.record.kind == "training":
        _print_training(console, report.record)
    else:
        console.print(comparison_table(report.rows, console.width))
        _print_end(console, report.record)
        _print_verdict(report.record, console)
    for name, path in (("checkpoint", "checkpoint"), ("record", "record.json"), ("report", "report.html")):
        if (folder / path).exists():
            print_line(console, f"{name + ':':<11} {folder / path}")
    return report.record.verdict is None or report.record.verdict.is_good


def _print_training(console: Console, record: RunRecord) -> None:
    assert record.training is not None
    if record.training.scores is None:
        print_line(console, "the trained model was not scored: the run ended before")
        return
    for name, value in record.training.scores.items():
        print_line(
            console,
            f"{name}: loss {value.loss_nats_per_token:.4f} nats per token, exact memorisation "
            f"{value.exact_memorisation:.4f} ({value.num_records} records)",
        )


def _print_verdict(record: RunRecord, console: Console) -> None:
    verdict, last, survival = record.verdict, record.rounds[-1].verdict, _survival(record)
    assert verdict is not None
    style = "bold" if verdict.is_good else "bold red"
    for sentence in verdict.sentences:
        console.print(sentence, style=style, markup=False, highlight=False, soft_wrap=True)
    if last.forget is not None and last.forget.outcome not in UNKNOWN:
        print_line(
            console,
            "  To forget more: raise solver.max_steps, if that is what ended the round (see above), or "
            "objective.forget_weight.",
        )
    if last.retain.outcome == "damaged":
        print_line(
            console,
            "  To keep more: raise solver.max_steps, so that the round can win it back, or objective.retain_weight; "
            "lower solver.learning_rate, if the method is a first-order one.",
        )
    if survival.projection < SURVIVAL_LEVEL:
        print_line(
            console,
            "  To save what was measured: set save.dtype=float32, or save.fp32_master=true to keep the fp32 weights "
            "beside the checkpoint.",
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
