"""Distributed second-order unlearning of Hugging Face checkpoints (arXiv 2406.14507) on Ray and DeepSpeed ZeRO.

What the command line does can be done from Python, with the same job files, dictionaries or `JobConfig`s:

    import distributed_unlearn

    plan = distributed_unlearn.plan("job.yaml")
    memory = {row.quantity: row.value for row in plan.rows}["memory a rank"]

    record = distributed_unlearn.unlearn("job.yaml")
    before, after = record.rounds[-1].before["forget"], record.rounds[-1].after["forget"]
    print(f"{memory}; forget loss {before.loss_nats_per_token:.2f} -> {after.loss_nats_per_token:.2f}")

    assert distributed_unlearn.load_record(record.config["output"]) == record

Importing this loads neither torch nor Ray; the first call does. Mistakes of the user raise a `UserError`.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from distributed_unlearn.errors import ConfigError, UserError
from distributed_unlearn.version import __version__

if TYPE_CHECKING:
    from distributed_unlearn.commands.plan import Plan
    from distributed_unlearn.config import JobConfig
    from distributed_unlearn.records import RunRecord

    Job = JobConfig | Mapping[str, object] | str | PathLike[str]

__all__ = ["UserError", "__version__", "load_record", "plan", "train", "unlearn"]


def unlearn(job: "Job") -> "RunRecord":
    """Run all rounds of a job that forgets; checkpoint, record and report are in its output folder.

    Args:
        job: A job file's path, its content as a mapping, or a `JobConfig`.

    Returns:
        The record as it was written: every step's scalars and the scores of every set before and after each round.

    Raises:
        UserError: anything that the user can act on; nothing is left half-written.
    """
    found = _job(job)
    if found.train is not None:
        raise ConfigError("a job with a train section", "a job that forgets", "call train(job), or remove the section")
    return _run(found)


def train(job: "Job") -> "RunRecord":
    """Run a job with a `train` section: fine-tune, or train the retrained reference.

    Args and errors as for `unlearn`.
    """
    found = _job(job)
    if found.train is None:
        raise ConfigError("a job without a train section", "a job that trains", "call unlearn(job), or add the section")
    return _run(found)


def plan(job: "Job") -> "Plan":
    """Validate a job, read its records and estimate what it needs; loads no weights and writes nothing.

    Args and errors as for `unlearn`.
    """
    from distributed_unlearn.commands.plan import make_plan

    return make_plan(_job(job))


def load_record(folder: str | PathLike[str]) -> "RunRecord":
    """The record in the output folder of a finished run.

    Raises:
        DataError: none there, one of another format, or one that was changed by hand.
    """
    from distributed_unlearn.files import expand_home
    from distributed_unlearn.records import RECORD_NAME, read_record

    return read_record(Path(expand_home(str(folder))) / RECORD_NAME)


def _job(job: "Job") -> "JobConfig":
    from distributed_unlearn.config import JobConfig, load_job, parse_job

    if isinstance(job, JobConfig):
        return job
    if isinstance(job, Mapping):
        return parse_job(dict(job), "the job")
    return load_job(Path(job), [])


def _run(job: "JobConfig") -> "RunRecord":
    from distributed_unlearn.commands.run import run_job

    return run_job(job).record
