"""The output folder of a run: fit to be written, this run's alone, and the same folder on every rank."""

import contextlib
import errno
import fcntl
import logging
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed_unlearn.errors import ConfigError
from distributed_unlearn.files import expand_home
from distributed_unlearn.workers.client import Workers

LOCK_NAME = ".running"
"""The file that a run holds locked in its output folder; it names the process."""
_RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's job server, and by nothing else, for the driver of a submitted job."""
_LOG = logging.getLogger(__name__)


def output_folder(output: str) -> Path:
    """The folder that `output` names, after every check that can be made without writing.

    Raises:
        ConfigError: a file, below a file, not writable, or a relative path inside a Ray job.
    """
    folder = Path(expand_home(output))
    if _RAY_JOB_VARIABLE in os.environ and not folder.is_absolute():
        raise ConfigError(
            f"output '{output}' in a submitted Ray job, whose working folder Ray deletes",
            "an absolute path",
            "set output to a folder on storage that all nodes share, e.g. output=/mnt/shared/runs/first",
        )
    existing = folder.absolute()
    while not os.path.lexists(existing):  # never raises, not even in a folder that may not be searched
        existing = existing.parent
    if not existing.is_dir():
        place = "is" if existing == folder.absolute() else "lies below"
        raise ConfigError(f"output '{output}', which {place} a file", "a folder", "choose another output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output '{output}', and '{existing}' may not be written",
            "a folder that this user can write",
            "choose another output or change the permissions",
        )
    return folder


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep every other run out of `folder`, which is made where it is missing and removed again if it stays empty.

    The lock ends with the process, however it ends. Only a process that is killed leaves the file behind, unlocked:
    the next run takes it over and removes it.

    Raises:
        ConfigError: another run holds the folder, or it cannot be made.
    """
    made: list[Path] = []
    try:
        try:
            _make(folder, made)
            lock = _lock(folder)
        except OSError as error:
            raise ConfigError(
                f"output '{folder}', which cannot be written ({error.strerror})",
                "a folder that this user can write",
                "choose another output",
            ) from error
        try:
            yield
        finally:
            (folder / LOCK_NAME).unlink(missing_ok=True)  # before the lock ends, so that it is nobody else's yet
            os.close(lock)
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # it holds something by now, and stays
                path.rmdir()


def _make(folder: Path, made: list[Path]) -> None:
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            path.mkdir(exist_ok=True)
            made.append(path)


def _lock(folder: Path) -> int:
    """An open, locked file descriptor; also where the file was removed and made anew between opening and locking."""
    path = folder / LOCK_NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock_open_file(descriptor, folder)
            if _is_at(descriptor, path):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_open_file(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        raise ConfigError(
            f"output '{folder}', in which {holder} is running",
            "one run at a time in an output folder",
            "wait for its end, or choose another output",
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _LOG.warning("'%s' is on storage without locks: make sure that no other run writes there", folder)


def confirm_shared(workers: Workers, folder: Path) -> None:
    """Make sure, before hours of work, that what the ranks will write arrives in this very folder.

    Raises:
        ConfigError: ranks that do not see a file which was written here.
    """
    token = secrets.token_hex(16)
    path = folder.resolve() / f".seen-{secrets.token_hex(4)}"
    try:
        path.write_text(token, encoding="utf-8")
        seen = workers.can_see(str(path), token)
    finally:
        path.unlink(missing_ok=True)
    blind = [str(rank) for rank, found in enumerate(seen) if not found]
    if blind:
        raise ConfigError(
            f"output '{folder}', which rank(s) {', '.join(blind)} of {workers.world_size} do not see",
            "a folder that is the same on every node",
            "choose an output on storage that all nodes share",
        )
