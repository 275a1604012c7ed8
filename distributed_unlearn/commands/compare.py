"""`compare`: methods and seeds on one base job; original and references once, then every cell; resumable."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from distributed_unlearn.cluster.open import open_group
from distributed_unlearn.commands.console_events import print_line
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.config.compare import CompareConfig, ComparedMethod
from distributed_unlearn.errors import ConfigError, NumericalError
from distributed_unlearn.files import write_json
from distributed_unlearn.provenance import package_versions
from distributed_unlearn.records import RECORD_NAME, RunRecord, read_record, to_json
from distributed_unlearn.records.comparison import (
    COMPARISON_FORMAT,
    COMPARISON_NAME,
    Cell,
    Comparison,
    Reference,
)
from distributed_unlearn.report.comparison import cells_table, last_round, method_summaries
from distributed_unlearn.report.progress import RoundProgress, TrainingProgress
from distributed_unlearn.rounds.comparison import (
    again,
    cell_of,
    closeness,
    content_hash,
    failed_cell,
    finished_cell,
    finished_training,
    going_on,
    hardware,
    reference_scores,
    shown_settings,
    write_cell,
)
from distributed_unlearn.rounds.events import OnStep, OnTrainingStep, Unwatched
from distributed_unlearn.rounds.folder import claimed, output_folder
from distributed_unlearn.rounds.origin import redacted_config
from distributed_unlearn.rounds.overview import write_overview
from distributed_unlearn.rounds.pending import settle
from distributed_unlearn.rounds.preparation import prepare_run
from distributed_unlearn.rounds.session import run_session
from distributed_unlearn.workers.group import WorkerGroup


class _Workers:
    """One worker group for all runs, opened when it is first needed and anew after a run that failed."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster, self._stack = cluster, ExitStack()
        self._group: WorkerGroup | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def group(self) -> WorkerGroup:
        """The open group."""
        if self._group is None:
            self._group = self._stack.enter_context(open_group(self._cluster))
        return self._group

    def close(self) -> None:
        """End the workers; a failure of one ends all of them anyway."""
        self._group = None
        self._stack.close()


class _Bars(Unwatched):
    """A bar or a few lines for each run."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name

    @contextmanager
    def round(self, round_index: int, num_rounds: int, max_steps: int) -> Iterator[OnStep]:
        """A bar over the round's steps, on a terminal; many short runs would fill a log."""
        if not self._console.is_terminal:
            yield lambda record, measured: None
            return
        with RoundProgress(self._console, max_steps, f"{self._name}: round {round_index + 1}/{num_rounds}") as bar:
            yield bar.update

    @contextmanager
    def training(self, num_steps: int) -> Iterator[OnTrainingStep]:
        """A bar over the training's steps."""
        with TrainingProgress(self._console, num_steps, self._name) as bar:
            yield bar.update


@dataclass(frozen=True)
class _Models:
    """What the methods start from and are compared with."""

    original: str
    """Checkpoint."""
    original_folder: str | None
    original_seconds: float | None
    references: tuple[Reference, ...]
    last_reference: str | None
    """Checkpoint of the reference after the last round."""


def run_compare(config: CompareConfig, console: Console) -> Comparison:
    """Run whatever is not finished, write comparison.json and the report; the last line printed is one JSON object.

    Raises:
        UserError: anything that the user can act on. A method that ends without a result is a row that says so.
    """
    folder = output_folder(config.output)
    with claimed(folder), _Workers(config.job.cluster) as workers:
        models = _train_models(config, folder, workers, console)
        comparison = _begin(config, models)
        comparison = _run_cells(config, folder, models, comparison, workers, console)
    report = write_overview([folder], folder / "report", overwrite=True)
    console.print(cells_table(comparison))
    line = {
        "comparison": str(folder / COMPARISON_NAME),
        "report": str(report),
        "num_rounds": comparison.num_rounds,
        "methods": {label: last_round(found) for label, found in method_summaries(comparison).items()},
    }
    console.print(json.dumps(to_json(line)), markup=False, highlight=False, soft_wrap=True)
    return comparison


def _begin(config: CompareConfig, models: _Models) -> Comparison:
    """The comparison before its first cell."""
    settings: dict[str, object] = {}
    for method in config.methods:
        job = config.unlearning(method, config.seeds[0], models.original, models.last_reference, config.output)
        settings[method.label] = shown_settings(job)
    return Comparison(
        format=COMPARISON_FORMAT,
        num_rounds=config.num_rounds,
        labels=tuple(method.label for method in config.methods),
        seeds=config.seeds,
        config=redacted_config(config.job),
        settings=settings,
        versions=package_versions(),
        hardware=hardware(config.job.cluster.num_workers),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        original=models.original_folder,
        original_seconds=models.original_seconds,
        original_tug_of_war=None,
        references=models.references,
        cells=(),
        num_cells=len(config.methods) * len(config.seeds),
    )


# -- models -----------------------------------------------------------------------------------------------


def _train_models(config: CompareConfig, folder: Path, workers: _Workers, console: Console) -> _Models:
    base = config.job
    if base.train is None:
        return _Models(base.model.path, None, None, (), base.retrained)
    models = output_folder(str(folder / "models") if config.models is None else config.models)

    def train(name: str, seed: int, rounds_left_out: int) -> tuple[Path, RunRecord]:
        job = config.training(seed, rounds_left_out, str(models / "new"))
        bars = _Bars(console, f"training the {name} model")
        run = prepare_run(job, models, bars)
        place = models / f"{name.replace(' ', '_')}_{content_hash(run)[:16]}"
        found = finished_training(place)
        if found is not None:
            print_line(console, f"{name}: found in {place}")
            return place, found
        started = time.monotonic()
        run = replace(run, job=job.model_copy(update={"output": str(place)}), folder=place)
        with claimed(place):
            record = run_session(workers.group(), run, bars)
            settle(place)
        print_line(console, f"{name}: trained in {time.monotonic() - started:.1f} s")
        return place, record

    def reference(seed: int, index: int) -> tuple[Path, Reference]:
        name = "retrained" if config.num_rounds == 1 else f"retrained round {index + 1}"
        place, record = train(name if seed == base.solver.seed else f"{name} seed {seed}", seed, index + 1)
        seconds = None if record.training is None else record.training.wall_seconds
        return place, Reference(seed, index, str(place), reference_scores(record, index), seconds, None)

    original, record = train("original", base.solver.seed, 0)
    seconds = None if record.training is None else record.training.wall_seconds
    pairs = [reference(base.solver.seed, index) for index in range(config.num_rounds)]
    first = [found for _, found in pairs]
    noise = [again(reference(seed, index)[1], item) for seed in config.noise_seeds for index, item in enumerate(first)]
    last = str(pairs[-1][0] / "checkpoint")
    return _Models(str(original / "checkpoint"), str(original), seconds, (*first, *noise), last)


# -- cells ------------------------------------------------------------------------------------------------


def _run_cells(
    config: CompareConfig, folder: Path, models: _Models, comparison: Comparison, workers: _Workers, console: Console
) -> Comparison:
    """Every method with the first seed, then with the second: after each seed all methods can be compared."""
    todo = [(seed, method) for seed in config.seeds for method in config.methods]
    cells: list[Cell] = []
    spent: list[float] = []
    for number, (seed, method) in enumerate(todo, start=1):
        started = time.monotonic()
        cell, is_new = _run_cell(config, folder, models, seed, method, workers, console)
        cells.append(cell)
        comparison = _with_cells(comparison, cells)
        write_json(folder / COMPARISON_NAME, to_json(comparison))
        if is_new:
            spent.append(time.monotonic() - started)
        left = len(todo) - number
        about = f"; about {left * sum(spent) / len(spent) / 60:.0f} min left" if spent and left else ""
        what = _in_words(cell) if is_new else f"finished before, {_in_words(cell)}"
        print_line(console, f"{number} of {len(todo)}, {method.label}, seed {seed}: {what}{about}")
    return comparison


def _with_cells(comparison: Comparison, cells: list[Cell]) -> Comparison:
    """The comparison with these cells, by method, then seed."""
    order = {label: index for index, label in enumerate(comparison.labels)}
    ordered = tuple(sorted(cells, key=lambda cell: (order[cell.label], cell.seed)))
    first, before = comparison.reference(0), next((cell.before for cell in ordered if cell.before), None)
    original = None if first is None or before is None else closeness(before, first.scores)
    return replace(comparison, cells=ordered, original_tug_of_war=original)


def _run_cell(
    config: CompareConfig,
    folder: Path,
    models: _Models,
    seed: int,
    method: ComparedMethod,
    workers: _Workers,
    console: Console,
) -> tuple[Cell, bool]:
    """The cell, and whether it was run just now. Its folder gets no page of its own: `report` draws one."""
    place = f"runs/{method.slug}/seed_{seed}"
    output = folder / place
    bars = _Bars(console, f"{method.label}, seed {seed}")
    with claimed(output):
        job = config.unlearning(method, seed, models.original, models.last_reference, str(output))
        run = prepare_run(job, output, Unwatched())
        sha256 = content_hash(run)
        found = finished_cell(output, sha256)
        if found is not None:
            return found, False
        try:
            record = (
                read_record(output / RECORD_NAME) if run.is_done else run_session(workers.group(), going_on(run), bars)
            )
            cell = cell_of(record, method.label, seed, place, models.references)
        except (NumericalError, ConfigError) as error:
            # A method that diverges, or that does not fit the model, is a row of the table and not its end.
            workers.close()
            cell = failed_cell(method.label, seed, place, f"{error.kind}: {error.got}")
        write_cell(output, cell, sha256)
        settle(output)
        return cell, True


def _in_words(cell: Cell) -> str:
    if cell.failure is not None:
        return f"no result ({cell.failure})"
    last, seconds = cell.rounds[-1], sum(item.wall_seconds for item in cell.rounds)
    tow = "" if last.tug_of_war is None else f"ToW {last.tug_of_war:.3f}, "
    return f"{tow}update norm {last.update_norm:.3g}, {seconds:.1f} s"
