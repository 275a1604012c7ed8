"""What a console shows of a run: counts of its records, warnings, bars and lines."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console

from distributed_unlearn.config import JobConfig
from distributed_unlearn.data.erased import num_learned_again
from distributed_unlearn.data.prepare import PreparedData
from distributed_unlearn.files import expand_home
from distributed_unlearn.records import RoundRecord
from distributed_unlearn.report.progress import RoundProgress, TrainingProgress, stage
from distributed_unlearn.report.tables import erased_text
from distributed_unlearn.rounds.events import OnStep, OnTrainingStep
from distributed_unlearn.rounds.unlearning import scores_samples
from distributed_unlearn.workers.messages import ModelFacts


def print_line(console: Console, text: str) -> None:
    """One line as it is: no markup, no highlighting, not folded."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class ConsoleEvents:
    """`RunEvents` on a console: bars and lines."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def prepared(self, job: JobConfig, data: PreparedData) -> None:
        """Counts of the records, and what a comparison will lack."""
        print_line(self._console, describe_data(data))
        warn_of_ids_files(self._console, job)
        warn_of_reference(self._console, job, data)
        _warn_of_samples(self._console, job, data)

    def stage(self, text: str) -> AbstractContextManager[None]:
        """A spinner or a line."""
        return stage(self._console, text)

    def note(self, text: str) -> None:
        """A line."""
        print_line(self._console, text)

    def opened(self, facts: ModelFacts) -> None:
        """A warning where the model could not be cut into segments, and how its statistics are used."""
        warn_of_fallback(self._console, facts.segment_fallback)
        say_statistics(self._console, facts.num_batch_norms)

    @contextmanager
    def round(self, round_index: int, num_rounds: int, max_steps: int) -> Iterator[OnStep]:
        """A bar over the round's steps."""
        with RoundProgress(self._console, max_steps, f"round {round_index + 1}/{num_rounds}") as progress:
            yield progress.update

    def round_ended(self, record: RoundRecord) -> None:
        """Why it ended, and how the sets stand."""
        print_line(self._console, f"round {record.round_index + 1}: {record.stop_reason}")
        print_line(self._console, f"round {record.round_index + 1}: {record.verdict.words}")

    @contextmanager
    def training(self, num_steps: int) -> Iterator[OnTrainingStep]:
        """A bar over the training's steps."""
        with TrainingProgress(self._console, num_steps, "training") as progress:
            yield progress.update


def describe_data(prepared: PreparedData) -> str:
    """Counts of the partition, in one line."""
    partition, report, erased = prepared.partition, prepared.report, prepared.erased
    rounds = ", ".join(str(len(forget)) for forget in partition.forget_rounds)
    text = (
        f"records: {len(partition.training)} trained on, to forget {rounds or 'none'}, "
        f"held out {len(partition.holdout)}, longest {report.longest} {report.unit}"
    )
    if report.num_truncated or report.num_dropped:
        text += f"; {report.num_truncated} truncated, {report.num_dropped} dropped"
    if erased.hashes or erased.num_unknown_subjects:
        text += f"; {erased_text(erased.num_records, erased.num_unknown)}"
    if erased.num_unknown_subjects:
        text += f"; the data holds no record of {erased.num_unknown_subjects} subject(s) of data.erased"
    return text


def warn_of_fallback(console: Console, reason: str | None) -> None:
    """Say why the whole model is one segment, where it is."""
    if reason is not None:
        console.print(f"warning: the whole model is one segment: {reason}", style="yellow", markup=False)


def say_statistics(console: Console, num_batch_norms: int) -> None:
    """Say what batch normalisation does, where there is any."""
    if num_batch_norms:
        print_line(
            console,
            f"note: {num_batch_norms} layer(s) of batch normalisation use their running statistics, which stay as they "
            "are in the checkpoint",
        )


def warn_of_ids_files(console: Console, job: JobConfig) -> None:
    """Say where others can read a file that names who asked to be forgotten; not its name, which may tell, too."""
    erased = job.data.erased
    named = [("forget" if job.rounds is None else "rounds", item.ids_file) for item in job.forget_rounds]
    for section, path in (*named, ("data.erased", None if erased is None else erased.ids_file)):
        if path is not None and Path(expand_home(path)).stat().st_mode & 0o044:
            console.print(
                f"warning: the ids file of {section} can be read by other users: chmod 600 it, so that nobody learns "
                "who asked.",
                style="yellow",
                markup=False,
            )


def warn_of_reference(console: Console, job: JobConfig, prepared: PreparedData) -> None:
    """Say where a retrained reference, by its own record, was not trained without what is erased."""
    if job.retrained is None or job.train is not None:
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


def _warn_of_samples(console: Console, job: JobConfig, data: PreparedData) -> None:
    if job.train is None and job.retrained is not None and scores_samples(job, data):
        console.print(
            "warning: evaluation.max_records_per_set scores samples, while the retrained reference is scored on whole "
            "sets: the Tug-of-War is left out. Set it to null to have it.",
            style="yellow",
        )
