"""What the user sees while a round runs: a live bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from distributed_unlearn.records import StepRecord
from distributed_unlearn.report.tables import number

PLAIN_EVERY_STEPS = 5
PLAIN_EVERY_SECONDS = 10.0


def forget_distance(terms: Mapping[str, float]) -> float | None:
    """The objective term that measures how far the forget set is from the holdout set, if there is one."""
    return next((value for name, value in terms.items() if "forget" in name and "distance" in name), None)


def step_fields(record: StepRecord, extra: Mapping[str, float]) -> dict[str, str]:
    """The columns of one step as short texts; quantities that a solver does not have are left out."""
    shown: dict[str, float | None] = {
        "loss": record.loss,
        "alpha": record.alpha,
        "gamma": record.gamma,
        "M": record.cubic_coefficient,
        "forget_distance": forget_distance(record.terms),
        **extra,
    }
    fields = {name.replace("_", " "): number(value, digits=3) for name, value in shown.items() if value is not None}
    fields["accepted"] = "yes" if record.accepted else "no"
    if record.num_rejections:
        fields["accepted"] += f" after {record.num_rejections} rejected"
    return fields


class RoundProgress:
    """A bar over the outer steps of one round with the last step's loss, alpha, gamma, M and verdict.

    Where the console is no terminal (a file, a Ray job's log) it prints a line for the first step, then every five
    steps or ten seconds, so that logs stay short and still show life.
    """

    def __init__(self, console: Console, total_steps: int | None, description: str) -> None:
        self._console, self._total_steps, self._description = console, total_steps, description
        self._start = self._last_line = time.monotonic()
        self._num_done = 0
        self._last_text = ""
        self._printed = True
        self._task: TaskID | None = None
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[done]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task(self._description, total=self._total_steps, done="", numbers="")
        else:
            limit = "until its time is up" if self._total_steps is None else f"at most {self._total_steps} steps"
            self._line(f"{self._description}: {limit}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif not self._printed:
            self._line(self._last_text)

    def update(self, record: StepRecord, extra: Mapping[str, float]) -> None:
        """Show one more finished step; `extra` adds columns, e.g. `{"retain loss": 0.02}`."""
        self._num_done += 1
        numbers = "  ".join(f"{name} {text}" for name, text in step_fields(record, extra).items())
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._num_done, done=self._done, numbers=numbers)
            return
        elapsed = time.monotonic() - self._start
        self._last_text = f"{self._description}: {self._done}, {elapsed:.0f} s  {numbers}"
        self._printed = False
        # Steps of an unbounded run are many and short: only the clock asks for a line.
        nth = self._total_steps is not None and self._num_done % PLAIN_EVERY_STEPS == 0
        if self._num_done == 1 or nth or time.monotonic() - self._last_line >= PLAIN_EVERY_SECONDS:
            self._line(self._last_text)

    @property
    def _done(self) -> str:
        of = "" if self._total_steps is None else f" of {self._total_steps}"
        return f"step {self._num_done}{of}"

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._last_line = time.monotonic()
        self._printed = True


@contextmanager
def stage(console: Console, text: str) -> Iterator[None]:
    """A long stage: a spinner on a terminal, a plain line elsewhere, and its seconds at the end, failed or not."""
    start = time.monotonic()
    verdict = "failed"
    try:
        if console.is_terminal:
            with console.status(escape(text)):  # a path may hold brackets
                yield
        else:
            console.print(f"{text} ...", markup=False, highlight=False, soft_wrap=True)
            yield
        verdict = "done"
    finally:
        seconds = time.monotonic() - start
        console.print(f"{text}: {verdict} in {seconds:.1f} s", markup=False, highlight=False, soft_wrap=True)


class TrainingProgress:
    """A bar with the loss on a terminal, a line every tenth of the run elsewhere."""

    def __init__(self, console: Console, num_steps: int, description: str) -> None:
        self._console, self._num_steps, self._description = console, num_steps, description
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("loss {task.fields[loss]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(description, total=num_steps, loss="-")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float) -> None:
        """A step has ended."""
        self._progress.update(self._task, completed=step + 1, loss=f"{loss:.4f}")
        if not self._console.is_terminal and (step + 1) % max(1, self._num_steps // 10) == 0:
            text = f"{self._description}: step {step + 1} of {self._num_steps}  loss {loss:.4f}"
            self._console.print(text, markup=False, highlight=False)
