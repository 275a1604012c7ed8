"""Folders that are complete or absent, the record beside a result, and its model card.

A result is written into a hidden folder beside its destination, flushed, and renamed when complete: a crash
leaves the destination as it was. Only a machine that stops between the two renames of a replacement leaves the
old folder under its hidden name, `.NAME.replaced-*`. The papers that tell of a result are set aside in the same
moment as the result that they tell of: a folder can lack its record, but never stand beside another's.
"""

import errno
import glob
import json
import logging
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed_unlearn.errors import ConfigError, ResourceError

_LOG = logging.getLogger(__name__)


def expand_home(path: str) -> str:
    """`path` with a leading `~` as the home folder; every other path, and every hub name, as it is."""
    return os.path.expanduser(path)


_REFUSED_WRITES = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
)


def unwritable(error: Exception) -> ResourceError | None:
    """The user's error behind one of the system: a disk that is full, broken or may not be written; None: another.

    Libraries that write for us (safetensors) hide the system's number in their text, as `(os error 28)`.
    """
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number is None or number not in _REFUSED_WRITES:
        return None
    place = getattr(error, "filename", None)
    what = "a file that could not be written" if place is None else f"'{place}', which could not be written"
    return ResourceError(
        f"{what} ({os.strerror(number)})",
        "a disk with room that this user can write",
        "make room or change the permissions, and run the command again: nothing is half-written",
    )


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            _flush_names(path)


def _flush_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(destination: Path, overwrite: bool) -> None:
    """Refuse a destination that exists, before any work is done.

    Raises:
        ConfigError: it exists and `overwrite` is false, or is no folder.
    """
    if destination.exists() and not destination.is_dir():
        raise ConfigError(f"output '{destination}', which is a file", "a folder", "choose another output")
    if destination.exists() and not overwrite:
        raise ConfigError(
            f"output '{destination}', which exists",
            "a folder that does not exist yet",
            "choose another output or set overwrite: true",
        )


@contextmanager
def complete_folder(destination: Path, overwrite: bool, papers: Sequence[Path] = ()) -> Iterator[Path]:
    """A staging folder that becomes `destination` when the block ends without an error, else vanishes.

    Args:
        destination: Where a link leads, the folder behind it is replaced and the link stays.
        overwrite: Whether `destination` may exist.
        papers: Files that tell of the folder that is replaced, see `set_aside`; put back if the replacement fails.

    Raises:
        ConfigError: `destination` exists and `overwrite` is false, or is no folder.
    """
    refuse_existing(destination, overwrite)
    destination = destination.resolve()
    destination.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(destination)
    staging = _staging(destination)
    staging.mkdir()
    try:
        yield staging
        _flush(staging)
        old = _swap(staging, destination, papers)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if old is not None:
        _remove_replaced(old)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder of the user's alone, removed with the block. It may hold rows of data while it lasts.

    So what a process left that was killed in its block is removed before the next one.
    """
    base = Path(tempfile.gettempdir()) / "distributed-unlearn"
    _remove_stale(base)
    folder = _staging(base)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(staging: Path, destination: Path, papers: Sequence[Path]) -> Path | None:
    """Put `staging` in the place of `destination`; returns where the old folder is now, if there was one."""
    old = destination.with_name(staging.name.replace(".writing-", ".replaced-"))
    moved = set_aside(papers)
    try:
        if not destination.exists():
            staging.rename(destination)
            return None
        destination.rename(old)
        try:
            staging.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
        return old
    except BaseException:
        for path, previous in moved:
            previous.replace(path)
        raise
    finally:
        _flush_names(destination.parent)


def _remove_replaced(old: Path) -> None:
    """The result is complete by now: an old folder that resists (NFS, permissions) must not make it a failure."""
    try:
        shutil.rmtree(old)
    except OSError as error:
        _LOG.warning("'%s', which was replaced, could not be removed (%s); remove it by hand", old, error.strerror)


def set_aside(papers: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Rename what tells of an earlier result to `*.previous.*`, one generation; returns (path, previous) pairs.

    The last of `papers` is the record itself and goes last. Where it is missing nothing is renamed: a run that
    ended before its record must not displace the salt of the record that is aside.
    """
    if not papers or not papers[-1].exists():
        return []
    moved = []
    for path in papers:
        if path.exists():
            previous = path.with_name(f"{path.stem}.previous{path.suffix}")
            path.replace(previous)
            moved.append((path, previous))
    _flush_names(papers[-1].parent)
    return moved


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}")


def _remove_stale(path: Path) -> None:
    """Remove what killed runs left under staging names of `path`.

    The name holds machine and process: whether a process of another machine still writes, nobody here can tell.
    """
    prefix = f".{path.name}.writing-"
    for left in path.parent.glob(glob.escape(prefix) + "*-*-*"):
        machine, process, _ = left.name.removeprefix(prefix).rsplit("-", 2)
        if machine == platform.node() and process.isdigit() and not process_runs(int(process)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def process_runs(process: int) -> bool:
    """Whether a process with this number runs on this machine."""
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys; NaN and infinity are refused rather than written as invalid JSON."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    _write_complete(path, text + "\n", 0o666)


def write_private_json(path: Path, value: Any) -> None:
    """Write JSON, as `write_json` does, that only its owner can read."""
    _write_complete(path, json.dumps(value, sort_keys=True, allow_nan=False) + "\n", 0o600)


def write_text(path: Path, text: str) -> None:
    """Write a text as it is; the file is complete or as before."""
    _write_complete(path, text, 0o666)


def write_bytes(path: Path, content: bytes) -> None:
    """Write content as it is; the file is complete or as before."""
    _write_complete(path, content, 0o666)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    _write_complete(path, text + "\n", 0o600)


def _write_complete(path: Path, content: str | bytes, mode: int) -> None:
    """Write a file that is complete or as before, whatever happens: aside, flushed, then renamed."""
    _remove_stale(path)
    staging = _staging(path)
    descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    _flush_names(path.parent)
