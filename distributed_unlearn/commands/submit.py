"""`submit`: a job file to the job server of a Ray cluster, once; its log and its exit code back.

What travels is one file without ids, or none: Ray keeps packages, entrypoints and metadata, and shows them.
"""

import argparse
import hashlib
import hmac
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from distributed_unlearn.config import parse_job
from distributed_unlearn.config.load import read_tree
from distributed_unlearn.config.submission import ids_files, inline_ids, require_fit_for_cluster
from distributed_unlearn.errors import ConfigError, RequestError, StoppedError, WorkerError
from distributed_unlearn.files import write_private
from distributed_unlearn.provenance import new_salt

if TYPE_CHECKING:
    from distributed_unlearn.cluster.submit import JobServer, JobState, Work

SALT_NAME = ".submit.salt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", re.IGNORECASE)
Commands = argparse._SubParsersAction


def add_submit(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `submit`."""
    parser = commands.add_parser("submit", help="hand a job to a Ray cluster's job server, and follow it there")
    parser.add_argument("job", type=Path, nargs="?", help="job file (YAML); without one, --id takes up a job again")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--address", help="http://HOST:8265; default: RAY_API_SERVER_ADDRESS")
    parser.add_argument("--id", help="submission id; default: from the job's content")
    parser.add_argument(
        "--follow", action="store_true", help="print the log until the job ends, end with its exit code"
    )
    parser.add_argument("--retry", action="store_true", help="where it failed or was stopped before, submit it again")
    parser.add_argument("--stop", action="store_true", help="end the job --id in order")
    parser.add_argument("--job-folder", type=Path, help="shared folder for the job file, which then does not travel")
    parser.add_argument("--ship-code", action="store_true", help="send this installation's code along (1 MB)")
    parser.add_argument("--python", default="python", help="interpreter on the cluster")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for driver and workers")
    parser.add_argument("--allow-incomplete", action="store_true", help="as of `run`")
    parser.add_argument("--patience-seconds", type=float, default=600.0, help="how long a connection may be lost")


@dataclass(frozen=True)
class Prepared:
    """A job that may travel."""

    text: str
    """The job file with its overrides, YAML."""
    digest: str
    """Of all that; salted where it holds ids."""


def run_submit(arguments: argparse.Namespace, console: Console) -> int:
    """Submit, follow, look at or stop a job; the log goes to stdout, everything else to stderr.

    Returns:
        The exit code: the job's own where it has ended; 0 where it runs, or was asked to end.

    Raises:
        StoppedError: the job was stopped.
        UserError: whatever is refused or ends a job.
    """
    _require_fit(arguments)
    prepared = None if arguments.job is None else prepare(arguments.job, arguments.overrides, arguments.job_folder)
    environment = _environment(arguments.env)
    server = _connect(arguments)
    if prepared is None:
        name = str(arguments.id)
        state = _known(server, name)
    else:
        name, state = _submit(server, prepared, environment, arguments)
    if arguments.stop:
        _tell(f"job {name} is being stopped" if server.stop(name) else f"job {name} had ended")
        if not arguments.follow:
            return 0
    if arguments.follow:
        state = _follow(server, name)
    else:
        console.print(name, markup=False, highlight=False, soft_wrap=True)
    _tell(f"job {name}: {state.status}" + ("" if state.exit_code is None else f", exit code {state.exit_code}"))
    return exit_code(state)


def _tell(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _require_fit(arguments: argparse.Namespace) -> None:
    if arguments.job is None and arguments.id is None:
        raise ConfigError("neither a job file nor --id", "one of them", "name the job file, or the job to take up")
    if arguments.stop and arguments.job is not None:
        raise ConfigError("--stop with a job file", "--stop --id ID", "name the job by its id alone")
    if arguments.job is None and (arguments.retry or arguments.job_folder or arguments.ship_code or arguments.env):
        raise ConfigError(
            "an option of a submission without a job file",
            "a job file beside --retry, --job-folder, --ship-code and --env",
            "name the job file, or leave the option out to take up the job --id as it is",
        )
    if arguments.id is not None and not _NAME.fullmatch(arguments.id):
        raise ConfigError(
            "an --id that no job can have",
            "1 to 100 letters, digits, points, hyphens and underscores, the first a letter or digit",
            "e.g. --id erasure-2026-01; without --id it is made from the job's content",
        )
    if not 0 <= arguments.patience_seconds <= 1e7:
        raise ConfigError("--patience-seconds out of range", "0 to 1e7", "e.g. --patience-seconds 600")


def prepare(path: Path, overrides: Sequence[str], folder: Path | None) -> Prepared:
    """A job file with its overrides, after every check that needs no cluster.

    The digest covers the settings, and size and time of the ids files that this machine sees: the same job with other
    ids in the same file is another one.

    Args:
        path: The job file.
        overrides: `section.key=value`.
        folder: Where the job file will be put instead of travelling; the salt of digests is kept there.

    Raises:
        ConfigError: the job is wrong, or names ids although it travels.
    """
    tree = read_tree(path, list(overrides), "job file")
    job = parse_job(tree, str(path))
    require_fit_for_cluster(job)
    inline = inline_ids(job)
    if inline and folder is None:
        raise ConfigError(
            f"ids in a job that would travel: {', '.join(inline)}",
            "ids in a file alone: Ray keeps what is submitted, for everybody who may list jobs",
            "write them to a file on shared storage (mode 0600) and name it as ids_file, or say --job-folder FOLDER: "
            "the job file is then put into that shared folder, and only its path travels",
        )
    seen = []
    for file in ids_files(job):
        with suppress(OSError):  # the cluster's nodes see it, this machine need not
            found = file.stat()
            seen.append([str(file), found.st_size, found.st_mtime_ns])
    content = json.dumps([tree, seen], sort_keys=True, default=str).encode()
    salt = "" if folder is None else _salt(folder)
    digest = hmac.new(salt.encode(), content, hashlib.sha256).hexdigest()
    return Prepared(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), digest)


def _salt(folder: Path) -> str:
    """The folder's own salt, made where there is none: without it nobody can try ids on a digest."""
    path = folder / SALT_NAME
    try:
        if not folder.is_absolute():
            raise ConfigError(f"--job-folder '{folder}'", "an absolute path, the same on every node", "write it out")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            staging = folder / f"{SALT_NAME}.{os.getpid()}"
            write_private(staging, new_salt())
            with suppress(FileExistsError):  # made in the meantime
                os.link(staging, path)
            staging.unlink()
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(
            f"--job-folder '{folder}', which cannot be used ({error.strerror})",
            "a folder that this user can write",
            "choose another, on storage that the cluster sees too",
        ) from error


def _environment(pairs: Sequence[str]) -> Mapping[str, str]:
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError("an --env without a name", "NAME=VALUE", "e.g. --env HF_HOME=/mnt/shared/hf")
        if _SECRET_NAME.search(name):
            raise ConfigError(
                f"--env {name}=..., by its name a secret",
                "settings that everybody who may list jobs can read: Ray keeps them",
                f"set {name} on the nodes",
            )
        found[name] = value
    return found


def _connect(arguments: argparse.Namespace) -> "JobServer":
    from distributed_unlearn.cluster.authentication import use_given_token

    use_given_token()  # before Ray is imported
    from distributed_unlearn.cluster.submit import ADDRESS_VARIABLE, JobServer

    address = arguments.address or os.environ.get(ADDRESS_VARIABLE)
    if not address:
        raise ConfigError(
            "no job server",
            f"--address http://HOST:8265, or {ADDRESS_VARIABLE} in the environment",
            "name the dashboard of the cluster; `ray dashboard cluster.yaml` forwards it to http://127.0.0.1:8265",
        )
    return JobServer(address, arguments.patience_seconds, _tell)


def _known(server: "JobServer", name: str) -> "JobState":
    state = server.find(name)
    if state is None:
        raise RequestError(
            f"job '{name}', which the cluster does not know", "the id of a submitted job", "correct --id"
        )
    return state


def _submit(
    server: "JobServer", prepared: Prepared, environment: Mapping[str, str], arguments: argparse.Namespace
) -> tuple[str, "JobState"]:
    """Submit a job unless it was before; its id, and how it stands.

    With --retry an attempt that failed or was stopped is followed by another: ID, ID-2, ID-3, ...
    """
    base = arguments.id or f"unlearn-{prepared.digest[:16]}"
    attempt = 1
    while True:
        name = base if attempt == 1 else f"{base}-{attempt}"
        state, submitted = server.find(name), False
        if state is None:  # looked at first: another job's file in the job folder must stay as it is
            with _work(name, prepared, environment, arguments) as work:
                submitted = server.submit(name, work)
            state = _known(server, name)
        if state.digest != prepared.digest:
            raise RequestError(
                f"job id '{name}', which another job has",
                "an id that says one job",
                "choose another --id, or leave it out: the id is then made from the job's content",
            )
        if arguments.retry and not submitted and state.status in ("FAILED", "STOPPED"):
            attempt += 1
            continue
        _tell(f"job {name} was submitted" + ("" if submitted else " before; it is taken up, nothing was submitted"))
        if not submitted and state.status in ("FAILED", "STOPPED"):
            _tell(f"it is {state.status}: --retry submits it again, as '{base}-{attempt + 1}'")
        return name, state


@contextmanager
def _work(
    name: str, prepared: Prepared, environment: Mapping[str, str], arguments: argparse.Namespace
) -> "Iterator[Work]":
    """What is submitted; the package's folder lasts as long as the block."""
    import distributed_unlearn
    from distributed_unlearn.cluster.submit import Work

    with tempfile.TemporaryDirectory(prefix="submit-") as scratch:
        if arguments.job_folder is None:
            package, where = Path(scratch), "job.yaml"
            (package / where).write_text(prepared.text, encoding="utf-8")
        else:
            package, where = None, str(arguments.job_folder / f"{name}.yaml")
            write_private(Path(where), prepared.text.rstrip("\n"))
        command = [arguments.python, "-m", "distributed_unlearn", "run", where]
        if arguments.allow_incomplete:
            command.append("--allow-incomplete")
        modules = (Path(distributed_unlearn.__file__).parent,) if arguments.ship_code else ()
        yield Work(f"exec {shlex.join(command)}", prepared.digest, package, modules, environment)


def _follow(server: "JobServer", name: str) -> "JobState":
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        return server.follow(name, write)
    except KeyboardInterrupt:
        _tell(f"no longer followed; the job goes on. Again: submit --id {name} --follow; to end it: --id {name} --stop")
        raise SystemExit(130) from None


def exit_code(state: "JobState") -> int:
    """What a job's end means for the command: its own exit code; 128 and the signal that ended it; 0 before its end.

    Raises:
        StoppedError: it was stopped.
        WorkerError: it failed without an exit code: it was never started, or its node is gone.
    """
    if state.status == "STOPPED":
        raise StoppedError(
            f"job '{state.name}', which was stopped",
            "a job that comes to its end",
            "give the command with --retry; with resume: true in the job it goes on from its last saved state",
        )
    if state.status != "FAILED":
        return 0
    code: Any = state.exit_code
    if not code:
        reason = (state.message.strip().splitlines() or ["no reason is known"])[0][:300]
        raise WorkerError(
            f"job '{state.name}', which failed without an exit code ({reason})",
            "a job that starts, and a head that lives as long",
            "see the job in the dashboard, and its supervisor's log on the head; then give the command with --retry",
        )
    return int(code) if code > 0 else 128 - int(code)
