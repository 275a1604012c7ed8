"""A run that has started: what a command that changes weights works with, from its job to its workers and log."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from distributed_unlearn.commands.job_record import Origin, find_origin
from distributed_unlearn.commands.output import confirm_shared
from distributed_unlearn.commands.workers import open_group
from distributed_unlearn.config import JobConfig
from distributed_unlearn.data.prepare import PreparedData
from distributed_unlearn.report.run_log import RunLog
from distributed_unlearn.workers.client import Workers


@dataclass(frozen=True, eq=False)
class Run:
    """A job with its workers, which have its corpus."""

    job: JobConfig
    prepared: PreparedData
    origin: Origin
    folder: Path
    console: Console
    workers: Workers
    log: RunLog


@contextmanager
def started(job: JobConfig, prepared: PreparedData, folder: Path, console: Console) -> Iterator[Run]:
    """Workers that see the output folder and hold the corpus, and a log, for the length of the block.

    `folder` is `claimed`. What a result is made from is taken before the workers are started.

    Raises:
        ConfigError, ResourceError: no such workers can be had, or they do not see the folder.
    """
    origin = find_origin(job.model, prepared.commit)
    with open_group(job.cluster) as group:
        workers = Workers(group)
        confirm_shared(workers, folder)
        with RunLog(folder) as log:
            workers.set_corpus(prepared.corpus)
            yield Run(job, prepared, origin, folder, console, workers, log)
