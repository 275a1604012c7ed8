"""A folder for a local Ray that goes when the driver does, however it ends, and every process of that Ray with it."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed_unlearn.cluster import reaper
from distributed_unlearn.errors import ResourceError, WorkerError

_LOG = logging.getLogger(__name__)


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder that this user alone can read, for the length of the block; Ray's processes carry its mark.

    A process beside this one (`cluster.reaper`) ends what still carries the mark and removes the folder after the
    block, or as soon as this process is dead. The logs stay where a worker or Ray failed, and are said to be there.

    Raises:
        ResourceError: no folder can be made.
    """
    parent = os.environ.get("RAY_TMPDIR") or "/tmp"  # as Ray does; its sockets' paths have 107 characters at most
    try:
        os.makedirs(parent, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="ray-", dir=parent)
    except OSError as error:
        raise ResourceError(
            f"no folder for a local Ray below '{parent}' ({error.strerror})",
            "a folder that this user can write",
            "set RAY_TMPDIR to one, with a short path",
        ) from error
    # A session of its own: what a terminal sends to the driver must not end it first.
    program = [sys.executable, "-I", reaper.__file__, folder, str(os.getpid())]
    with subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True) as process:
        os.environ[reaper.MARK] = folder
        message = b""
        try:
            yield Path(folder)
        except (WorkerError, ResourceError):
            if reaper.sessions_with_logs(Path(folder)):
                message = reaper.KEEP_LOGS
                _LOG.warning("Ray's own logs of this run stay in '%s'", folder)
            raise
        finally:
            os.environ.pop(reaper.MARK, None)
            process.communicate(message)
