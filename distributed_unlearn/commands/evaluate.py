"""`evaluate`: what a checkpoint still knows, as a table, `evaluation.json`, pictures and one last line of JSON."""

import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console

from distributed_unlearn.cluster.open import open_group
from distributed_unlearn.commands.console_events import print_line
from distributed_unlearn.config import EvaluateConfig
from distributed_unlearn.evaluation.session import evaluate, prepare_evaluation
from distributed_unlearn.evaluation.watch import Unwatched, Watch
from distributed_unlearn.files import expand_home, write_json, write_text
from distributed_unlearn.records import to_json
from distributed_unlearn.records.evaluation import EVALUATION_NAME, EvaluationRecord, read_evaluation
from distributed_unlearn.report.drawing import numbers_csv
from distributed_unlearn.report.evaluation import evaluation_lines, evaluation_pictures
from distributed_unlearn.rounds.folder import claimed, output_folder
from distributed_unlearn.workers.group import WorkerGroup

_PLAIN_EVERY_SECONDS = 10.0


def evaluate_checkpoint(
    config: EvaluateConfig, watch: Watch | None = None, group: WorkerGroup | None = None
) -> EvaluationRecord:
    """Measure a checkpoint and write `evaluation.json` and `pictures/` into the output folder.

    Args:
        config: What to measure.
        watch: Who is told; None: nobody.
        group: Open workers to run on, which stay open; None: those that the file's `cluster` asks for.

    Returns:
        The evaluation as it was read back.

    Raises:
        UserError: anything that the user can act on; what was measured until then is in the cache.
    """
    folder, told = output_folder(config.output), Unwatched() if watch is None else watch
    with claimed(folder):
        prepared = prepare_evaluation(config)
        for item in prepared.not_measured:
            told.note(f"not measured: {item.name}, which {item.why}")
        cache = folder / "cache" if config.cache is None else Path(expand_home(config.cache))
        opened: AbstractContextManager[WorkerGroup] = (
            open_group(config.cluster) if group is None else nullcontext(group)
        )
        with opened as workers:
            record = evaluate(workers, prepared, cache, told)
        write_json(folder / EVALUATION_NAME, to_json(record))
        record = read_evaluation(folder / EVALUATION_NAME)
        _write_pictures(record, folder / "pictures")
    return record


def _write_pictures(record: EvaluationRecord, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for picture in evaluation_pictures(record):
        write_text(folder / f"{picture.name}.svg", picture.svg)
        write_text(folder / f"{picture.name}.csv", numbers_csv(picture))


def run_evaluate_command(config: EvaluateConfig, console: Console) -> None:
    """`evaluate_checkpoint`, with all that there is to see on the console.

    Raises:
        UserError: anything that the user can act on.
    """
    record = evaluate_checkpoint(config, ConsoleWatch(console))
    folder = output_folder(config.output)
    for line in evaluation_lines(record):
        console.print(line, markup=False, highlight=False)
    print_line(console, f"evaluation: {folder / EVALUATION_NAME}")
    print_line(console, f"pictures:   {folder / 'pictures'} (each with its numbers as .csv)")
    print_line(console, json.dumps(summary(record, folder / EVALUATION_NAME)))


def summary(record: EvaluationRecord, path: Path) -> dict[str, object]:
    """The last line: every value by metric, set and condition; what is not there was not measured."""
    values = {".".join(filter(None, (row.name, row.set_name, row.condition))): row.value for row in record.rows}
    return {
        "evaluation": str(path),
        "model": record.model.path,
        "values": to_json(values),
        "not_measured": {item.name: item.why for item in record.not_measured},
        "num_cached": record.num_cached,
        "wall_seconds": round(record.wall_seconds, 3),
    }


class ConsoleWatch:
    """A line for every part when it has ended, and while it takes long one now and then with the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = self._last = time.monotonic()

    def note(self, text: str) -> None:
        """A line."""
        print_line(self._console, text)

    def progress(self, text: str, num_done: int, num_total: int) -> None:
        """How far a part is; the time left is what is left at the speed so far."""
        now = time.monotonic()
        if num_done == 0 and num_total > 0:
            self._started = self._last = now
        elif num_done >= num_total:
            print_line(self._console, f"{text}: {num_total} in {now - self._started:.1f} s")
        elif now - self._last >= _PLAIN_EVERY_SECONDS:
            left = (now - self._started) / num_done * (num_total - num_done)
            print_line(self._console, f"{text}: {num_done} of {num_total}, about {left:.0f} s left")
            self._last = now
