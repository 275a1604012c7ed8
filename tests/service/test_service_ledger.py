"""The ledger: complete or unchanged, append-only, verifiable, and refused in one clear error when it is damaged."""

import hashlib
import json
import os
import sqlite3
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from setuptools import find_packages
from sqlalchemy import delete, insert, inspect, select, update

from distributed_unlearn.config.service import RequestsConfig
from distributed_unlearn.errors import LedgerError
from distributed_unlearn.service import tables
from distributed_unlearn.service.database import connect, ledger_url
from distributed_unlearn.service.heads import read_head, sign_head
from distributed_unlearn.service.keys import generate_key, load_public_key, load_signer
from distributed_unlearn.service.lease import acquire
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.requests import NewRequest, add_request, withdraw
from distributed_unlearn.service.rounds_book import StateFiles, commit_round, roll_back, schedule_ripe, start_round
from distributed_unlearn.service.states import Reason, RequestState
from distributed_unlearn.service.verification import verify_ledger
from tests.service.conftest import BOTH

SECRET = "anna.secret@example.org"


def fill(ledger, root: Path):
    """Four requests; one round rolled back, one committed with a file on disk; returns the lease."""
    for number in range(3):
        add_request(ledger, NewRequest(record_ids=(f"row-{number}",), external_id=f"case-{number}"), RequestsConfig())
    add_request(ledger, NewRequest(subjects=(SECRET,)), RequestsConfig())
    withdraw(ledger, 3, Reason.WITHDRAWN, RequestState.REVOKED)
    lease = acquire(ledger, "node/0/test", 60)
    schedule_ripe(ledger, lease)
    roll_back(ledger, lease, start_round(ledger, lease, [1, 2]).number, Reason.GATE_FAILED, "retain loss 9 over 1")
    folder = root / "states" / "round-0002"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("{}")
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # SHA-256 of `{}`
    state = StateFiles("states/round-0002", digest, {"record.json": digest})
    start_round(ledger, lease, [1, 2])
    commit_round(ledger, lease, 2, state, {1: ["row-0"], 2: ["row-1"]})
    return lease


@BOTH
def test_a_used_ledger_verifies_with_its_files_and_signatures(ledger, tmp_path):
    lease = fill(ledger, tmp_path)
    public = generate_key(tmp_path / "operator.key")
    head = sign_head(ledger, lease, load_signer(tmp_path / "operator.key"))
    found = verify_ledger(ledger, tmp_path, [load_public_key(public)], (head.seq, head.hash))
    assert found.broken is None
    assert (found.num_entries, found.num_signed_heads, found.last_signed, found.num_files) == (
        head.seq,
        1,
        head.seq,
        1,
    )


@BOTH
def test_migrations_make_the_tables_that_the_code_expects(ledger, database):
    with connect(ledger_url(database), create=False).connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), tables.METADATA)
    assert [change for change in differences if "alembic_version" not in str(change)] == []


@BOTH
@pytest.mark.parametrize("statement", [update(tables.AUDIT).values(at="x"), delete(tables.AUDIT)])
def test_the_database_refuses_to_change_the_trail(ledger, statement):
    with pytest.raises(LedgerError, match="append-only|refused a write"), ledger.write() as writing:
        writing.connection.execute(statement)


@BOTH
def test_a_write_that_fails_halfway_leaves_nothing(ledger, tmp_path):
    before = read_head(ledger)
    with pytest.raises(ZeroDivisionError), ledger.write() as writing:
        writing.append("request_overdue", {"request": 1})
        raise ZeroDivisionError
    assert read_head(ledger) == before


def _tamper(database: str, sql: str) -> None:
    """Change a ledger behind its triggers' back, as the owner of its file can."""
    with sqlite3.connect(ledger_url(database).database) as connection:
        for verb in ("update", "delete"):
            connection.execute(f"DROP TRIGGER audit_no_{verb}")
        connection.executescript(sql)


@pytest.mark.parametrize(
    ("sql", "broken"),
    [
        ("UPDATE audit SET at = '2020' WHERE seq = 3", "audit entry 3 (request_received) was changed"),
        ("UPDATE audit SET body = replace(body, '3', '2') WHERE seq = 6", "audit entry 6 (request_moved) was changed"),
        ("DELETE FROM audit WHERE seq = 4", "audit entry 4 is missing"),
        ("UPDATE audit SET previous = hash WHERE seq = 5", "audit entry 5 does not follow entry 4"),
        ("UPDATE ledger SET head_seq = 99", "audit entry 99: the ledger's head"),
        ("UPDATE requests SET state = 'erased' WHERE id = 4", "request 4: its state"),
        ("UPDATE requests SET due_at = '2099' WHERE id = 1", "request 1: its due_at"),
        ("DELETE FROM erased_records WHERE request_id = 1", "round 2: its erased records"),
        ("UPDATE request_names SET name_hash = 'x' WHERE request_id = 2", "request 2: its ids"),
        ("UPDATE request_names SET name = 'row-9' WHERE request_id = 2", "request 2: an id"),
        ("UPDATE erased_records SET record_id = 'row-9' WHERE request_id = 1", "round 2: an erased record"),
        ("UPDATE requests SET external_id = 'case-9' WHERE id = 1", "request 1: its external id"),
        ("UPDATE requests SET round_id = 1 WHERE id = 1", "request 1: its round_id"),
        ("UPDATE rounds SET parent = 1 WHERE id = 2", "round 2: its parent"),
        ("""UPDATE rounds SET files_sha256 = '{}' WHERE id = 2""", "round 2: its list of files"),
        ("UPDATE ledger SET current_round = 1", "the current round is 1"),
    ],
)
def test_verification_names_the_first_broken_entry(ledger, database, tmp_path, sql, broken):
    fill(ledger, tmp_path)
    assert verify_ledger(ledger, tmp_path, []).broken is None
    _tamper(database, sql)
    found = verify_ledger(ledger, tmp_path, [])
    assert found.broken is not None and broken in found.broken


def test_a_trail_that_was_cut_is_found_by_its_signed_or_noted_head(ledger, database, tmp_path):
    lease = fill(ledger, tmp_path)
    public = load_public_key(generate_key(tmp_path / "operator.key"))
    head = sign_head(ledger, lease, load_signer(tmp_path / "operator.key"))
    cut = (
        f"DELETE FROM audit WHERE seq >= {head.seq - 3};"
        "UPDATE ledger SET head_seq = (SELECT max(seq) FROM audit), "
        "head_hash = (SELECT hash FROM audit ORDER BY seq DESC LIMIT 1);"
    )
    _tamper(database, "PRAGMA foreign_keys = OFF;" + cut)
    assert "was signed, is gone" in verify_ledger(ledger, None, [public]).broken
    assert (
        f"entry {head.seq}, which was noted, is gone" in verify_ledger(ledger, None, [], (head.seq, head.hash)).broken
    )


def test_heads_that_none_of_the_given_keys_signed_do_not_verify(ledger, tmp_path):
    lease = fill(ledger, tmp_path)
    public = load_public_key(generate_key(tmp_path / "operator.key"))
    other = load_public_key(generate_key(tmp_path / "other.key"))
    assert verify_ledger(ledger, None, [other]).broken is None, "nothing is signed yet"
    sign_head(ledger, lease, load_signer(tmp_path / "operator.key"))
    assert "none of them by the given key" in verify_ledger(ledger, None, [other]).broken
    assert verify_ledger(ledger, None, [other, public]).broken is None


def test_a_trail_that_was_written_anew_is_found_by_a_noted_hash(ledger, tmp_path):
    fill(ledger, tmp_path)
    assert "written anew" in verify_ledger(ledger, None, [], (5, "0" * 64)).broken


def test_a_forged_signature_and_a_changed_file_are_found(ledger, tmp_path):
    lease = fill(ledger, tmp_path)
    public = load_public_key(generate_key(tmp_path / "operator.key"))
    head = sign_head(ledger, lease, load_signer(tmp_path / "operator.key"))
    (tmp_path / "states" / "round-0002" / "record.json").write_text("{ }")
    assert "'states/round-0002/record.json' was changed" in verify_ledger(ledger, tmp_path, [public]).broken
    with ledger.write() as writing:
        writing.connection.execute(update(tables.SIGNATURES).values(signature="AAAA"))
    assert f"audit entry {head.seq}: the signature" in verify_ledger(ledger, tmp_path, [public]).broken


def test_the_file_is_its_owners_alone_and_ids_are_not_in_the_trail(ledger, database, tmp_path):
    fill(ledger, tmp_path)
    path = Path(ledger_url(database).database)
    with sqlite3.connect(path) as connection:  # kept open: the side files exist
        connection.execute("SELECT * FROM audit").fetchall()
        modes = {stat.S_IMODE(os.stat(found).st_mode) for found in tmp_path.glob("ledger.db*")}
        bodies = " ".join(body for (body,) in connection.execute("SELECT body FROM audit"))
    assert modes == {0o600}
    assert SECRET not in bodies and "row-0" not in bodies and "case-1" not in bodies


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("nosuch://x/y", "driver"),
        ("!!://x", "cannot be read"),
        ("postgresql://user:hunter2@127.0.0.1:1/none", "cannot be used"),
        ("/nonexistent/folder/ledger.db", "cannot be made"),
    ],
)
def test_urls_that_cannot_be_are_refused_without_the_password(url, expected):
    with pytest.raises(LedgerError, match=expected) as refused:
        open_ledger(url, create=True)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("content", [b"not a database at all, but text", b"SQLite format 3\x00" + b"\xff" * 200, b""])
def test_files_that_are_no_ledger_are_refused_and_kept(tmp_path, content):
    path = tmp_path / "ledger.db"
    path.write_bytes(content)
    with pytest.raises(LedgerError):
        open_ledger(str(path))
    assert path.read_bytes() == content


@BOTH
def test_a_database_of_something_else_is_left_alone(database):
    url = ledger_url(database)
    with connect(url, create=True).connect() as connection:
        connection.exec_driver_sql("CREATE TABLE theirs (id INTEGER)")
        connection.commit()
    for create, expected in ((True, "other tables"), (False, "which is no ledger")):
        with pytest.raises(LedgerError, match=expected):
            open_ledger(database, create)
    with connect(url, create=False).connect() as connection:
        assert inspect(connection).get_table_names() == ["theirs"]


def test_a_missing_ledger_is_made_only_where_that_is_asked(tmp_path):
    with pytest.raises(LedgerError, match="does not exist"):
        open_ledger(str(tmp_path / "typo.db"))
    assert not (tmp_path / "typo.db").exists()


def test_a_ledger_of_a_newer_program_is_refused(ledger, database):
    with sqlite3.connect(ledger_url(database).database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LedgerError, match="revision 9999"):
        open_ledger(database)


def test_a_read_only_ledger_can_be_read_and_says_so_when_written(ledger, database):
    path = Path(ledger_url(database).database)
    if os.geteuid() != 0:
        path.chmod(0o400)
        with pytest.raises(LedgerError):
            add_request(ledger, NewRequest(subjects=("a",)), RequestsConfig())
    else:  # root may write everything: a full disk is the refusal that it meets
        with pytest.raises(LedgerError, match="full"), ledger.write() as writing:
            pages = writing.connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            writing.connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
            for _ in range(100):
                writing.append("request_overdue", {"filler": "x" * 4000})
    assert verify_ledger(ledger, None, []).broken is None


OPEN = "import sys\nfrom distributed_unlearn.service.ledger import open_ledger\nopen_ledger(sys.argv[1], create=True)"


@BOTH
def test_processes_that_open_a_new_ledger_at_once_make_one(database):
    started = [subprocess.Popen([sys.executable, "-c", OPEN, database]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    with open_ledger(database).read() as connection:
        entries = connection.execute(select(tables.AUDIT.c.event)).scalars().all()
    assert entries == ["ledger_created"]


KILLED = """
import os, sys, threading
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.requests import NewRequest, add_request
ledger = open_ledger(sys.argv[1])
for number in range(10**6):
    add_request(ledger, NewRequest(record_ids=(f"{os.getpid()}-{number}",)), RequestsConfig())
    sys.stdout.write("x"); sys.stdout.flush()
"""


@BOTH
@pytest.mark.parametrize("seed", range(2))
def test_writers_that_are_killed_lose_no_request_and_break_no_chain(ledger, database, seed):
    started = [subprocess.Popen([sys.executable, "-c", KILLED, database], stdout=subprocess.PIPE) for _ in range(2)]
    told = [process.stdout.read(5 + 3 * seed) for process in started]  # both have written, both go on
    for process in started:
        process.kill()
    told = [len(first + process.communicate()[0]) for first, process in zip(told, started, strict=True)]
    with ledger.read() as connection:
        names = connection.execute(select(tables.NAMES.c.name)).scalars().all()
    for process, count in zip(started, told, strict=True):
        mine = {name for name in names if name.startswith(f"{process.pid}-")}
        # Each that was told is there; the one that was being told of may be.
        assert mine == {f"{process.pid}-{n}" for n in range(len(mine))} and len(mine) - count in (0, 1)
    assert verify_ledger(ledger, None, []).broken is None


def test_rows_that_contradict_each_other_are_refused_by_the_database(ledger):
    with pytest.raises(LedgerError, match="refused a write") as refused, ledger.write() as writing:
        writing.connection.execute(
            insert(tables.NAMES).values(request_id=77, name_hash="h", kind="record", name=SECRET)
        )
    assert SECRET not in str(refused.value)


def test_entries_are_hashed_as_documented(ledger):
    with ledger.read() as connection:
        row = connection.execute(select(tables.AUDIT)).first()
    listed = json.dumps([1, row.at, "ledger_created", row.body, "0" * 64], separators=(",", ":"))
    assert row.hash == hashlib.sha256(listed.encode()).hexdigest()


def test_the_migrations_are_packages_that_a_wheel_carries():
    root = Path(__file__).resolve().parents[2]
    include = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    folder = "distributed_unlearn.service.migrations"
    assert {folder, f"{folder}.versions"} <= set(find_packages(str(root), include=include))
