"""A ledger of each kind: every test that takes `ledger` runs on SQLite and on a real PostgreSQL."""

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy

from distributed_unlearn.service.ledger import Ledger, open_ledger
from tests.service.postgresql import MissingServerError, server


class Clock:
    """A clock that goes where a test sets it."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **amount: float) -> None:
        self.now += timedelta(**amount)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    try:
        with server() as url:
            yield url
    except MissingServerError as error:
        pytest.skip(f"PostgreSQL is not tested here: {error}")


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database of this test's own; SQLite unless the test asks for both."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    template, name = request.getfixturevalue("postgresql"), f"test_{secrets.token_hex(6)}"
    engine = sqlalchemy.create_engine(
        template.format("postgres").replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return template.format(name)


BOTH = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def ledger(database: str, clock: Clock) -> Ledger:
    return open_ledger(database, create=True, clock=clock)
