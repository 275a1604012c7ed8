"""A PostgreSQL server of the machine's own packages, for the length of a test session: no network, no password.

Found on the path or where Debian puts it. Where there is none, and DISTRIBUTED_UNLEARN_INSTALL_POSTGRESQL=1 allows it,
root installs Debian's package first. Else the tests that need it are skipped, and say so.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("initdb", "pg_ctl", "postgres")


class MissingServerError(Exception):
    """No server can be had here; says why."""


def find_programs() -> Path:
    """The folder with the server's programs."""
    folders = [Path(found).parent for found in (shutil.which("initdb"),) if found]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if all((folder / name).exists() for name in PROGRAMS):
            return folder
    raise MissingServerError("no PostgreSQL server is installed (Debian: apt-get install postgresql)")


def _install() -> None:
    if os.environ.get("DISTRIBUTED_UNLEARN_INSTALL_POSTGRESQL") != "1" or os.geteuid() != 0:
        return
    if shutil.which("apt-get") is not None:
        subprocess.run(["apt-get", "install", "-y", "-q", "postgresql"], timeout=600, check=False, capture_output=True)


def _other_user() -> str | None:
    """A server refuses to run as root: the user to run it as, None for this one."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise MissingServerError("PostgreSQL does not run as root, and there is no user postgres or nobody")


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A running server on a Unix socket; yields its URL up to the name of a database."""
    try:
        programs = find_programs()
    except MissingServerError:
        _install()
        programs = find_programs()
    user = _other_user()
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # the socket's path must be short
    try:
        if user is not None:
            shutil.chown(folder, user)
        data, name = folder / "data", user or pwd.getpwuid(os.geteuid()).pw_name

        def call(program: str, *arguments: str) -> None:
            command = [str(programs / program), *arguments]
            done = subprocess.run(command, user=user, cwd=folder, capture_output=True, text=True, timeout=120)
            if done.returncode != 0:
                raise MissingServerError(f"{program} failed: {(done.stderr or done.stdout).strip()[-300:]}")

        call("initdb", "-D", str(data), "-U", name, "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        call("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-w", "-o", options, "start")
        try:
            yield f"postgresql://{name}@/{{}}?host={folder}"
        finally:
            call("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
