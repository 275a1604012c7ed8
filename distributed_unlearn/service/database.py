"""The database behind a ledger: an SQLite file or any other SQLAlchemy URL, opened safely and migrated.

SQLite: write-ahead log, full synchronisation, foreign keys, a busy timeout, and a file that its owner alone can read;
a transaction that writes says so when it begins (BEGIN IMMEDIATE), so that it never finds out too late that another
writes. The file must lie on a local disk: the write-ahead log does not work over a network file system.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from distributed_unlearn.errors import LedgerError

BUSY_TIMEOUT_SECONDS = 30
_WRITES = "ledger_writes"
_MAKING_LOCK = 0x6C6564676572  # any number of our own: PostgreSQL's advisory locks have no names


def ledger_url(text_url: str) -> URL:
    """A database URL; a plain path is an SQLite file, and `postgresql://` is opened by psycopg.

    Raises:
        LedgerError: no such URL can be, or an SQLite database in memory.
    """
    try:
        url = make_url(text_url) if "://" in text_url else URL.create("sqlite", database=text_url)
    except ArgumentError:
        raise LedgerError(
            "a ledger URL that cannot be read",
            "a path, sqlite:///PATH or e.g. postgresql://USER@HOST/NAME",
            "correct the URL",
        ) from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:") or "mode=memory" in text_url:
            raise LedgerError("a ledger in memory", "a file, which survives the process", "give a path")
        url = url.set(database=str(Path(url.database or "").expanduser().absolute()))
    return url


def shown(url: URL) -> str:
    """The URL without its password."""
    return url.render_as_string(hide_password=True)


def connect(url: URL, create: bool) -> Engine:
    """An engine for the ledger at `url`.

    Args:
        url: See `ledger_url`.
        create: Whether a missing SQLite file is made, for its owner alone.

    Raises:
        LedgerError: a missing file or driver.
    """
    if url.get_backend_name() == "sqlite":
        _prepare_file(Path(url.database or ""), create)
    try:
        # Parameters hold ids of people: they are kept out of every message of SQLAlchemy.
        engine = create_engine(url, poolclass=NullPool, hide_parameters=True)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise LedgerError(
            f"ledger '{shown(url)}', whose database driver is not installed ({error})",
            "a driver that SQLAlchemy can load",
            "for PostgreSQL: pip install 'distributed-unlearn[postgresql]'",
        ) from None
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _set_pragmas)
        event.listen(engine, "begin", _begin)
    return engine


def _prepare_file(path: Path, create: bool) -> None:
    if not create:
        if not path.exists():
            raise LedgerError(
                f"ledger '{path}', which does not exist",
                "an existing ledger",
                "check the path; `request add` makes a new one",
            )
        return
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite gives its side files the same permissions
        if path.stat().st_size == 0:
            with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_SECONDS)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")  # kept in the file
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(
            f"ledger '{path}', which cannot be made ({getattr(error, 'strerror', None) or error})",
            "a path in an existing folder that this user can write",
            "make the folder or choose another path",
        ) from error


def _set_pragmas(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would come too late, and never be IMMEDIATE
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_SECONDS * 1000}",
        "synchronous = FULL",
        "foreign_keys = ON",
        "secure_delete = ON",  # what is purged is overwritten
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(_WRITES) else "BEGIN")


@contextmanager
def transaction(engine: Engine, writes: bool) -> Iterator[Connection]:
    """A connection inside one transaction: whole or not at all.

    Raises:
        LedgerError: the database does not answer, is damaged, full, locked for too long or read-only.
    """
    try:
        with engine.connect().execution_options(**{_WRITES: writes}) as connection, connection.begin():
            yield connection
    except IntegrityError as error:
        raise LedgerError(
            f"ledger '{shown(engine.url)}', which refused a write ({type(error.orig).__name__})",
            "rows that agree with each other",
            "run `verify --ledger`; nothing was written",
        ) from error
    except (SQLAlchemyError, OSError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        first_line = (str(cause).splitlines() or [""])[0]
        raise LedgerError(
            f"ledger '{shown(engine.url)}', which cannot be used ({type(cause).__name__}: {first_line})",
            "a database that answers and can be written",
            "check the database, its disk and permissions; nothing was written",
        ) from error


def lock_for_making(connection: Connection) -> None:
    """Wait for every other process that makes tables or the first row; SQLite's write transaction does so by itself."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MAKING_LOCK})


def migrate(engine: Engine, create: bool) -> None:
    """Bring the tables to this program's revision, in one transaction.

    Args:
        engine: See `connect`.
        create: Whether a database without tables becomes a ledger.

    Raises:
        LedgerError: no ledger, or one that a newer program wrote.
    """
    config = Config()
    config.set_main_option("script_location", "distributed_unlearn.service:migrations")
    scripts = ScriptDirectory.from_config(config)
    with transaction(engine, writes=False) as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    if current == scripts.get_current_head():
        return
    if current is None and not create:
        raise LedgerError(
            f"'{shown(engine.url)}', which is no ledger", "a ledger", "check the URL; `request add` makes a new ledger"
        )
    if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
        raise LedgerError(
            f"ledger '{shown(engine.url)}' of revision {current}",
            f"revision {scripts.get_current_head()} or older",
            "install the version of distributed-unlearn that wrote it, or a newer one",
        )
    with transaction(engine, writes=True) as connection:
        lock_for_making(connection)
        tables = inspect(connection).get_table_names()
        if tables and "alembic_version" not in tables:
            raise LedgerError(
                f"'{shown(engine.url)}', a database with other tables",
                "an empty one",
                "give the ledger its own database",
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")  # does nothing where another process was faster
