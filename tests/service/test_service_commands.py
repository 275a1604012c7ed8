"""`request`, `verify` and `key` on the command line: what they print, and one clear error for every mistake."""

import importlib.util
import json
import sqlite3
import stat
from pathlib import Path

import pytest

from distributed_unlearn.service.lease import acquire
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.rounds_book import StateFiles, commit_round, schedule_ripe, start_round
from tests.cli.command_line import assert_refused, call, succeed


@pytest.fixture
def url(tmp_path):
    return str(tmp_path / "ledger.db")


def _json(outcome):
    return json.loads(outcome.out)


def test_a_request_from_its_arrival_to_its_end(capsys, url, tmp_path):
    (tmp_path / "ids.txt").write_text("row-1\n\n row-2 \n")
    added = _json(
        succeed(
            capsys,
            ["request", "add", "--ledger", url, "--subject", "anna", "--record-id", "row-0", "--file"]
            + [str(tmp_path / "ids.txt"), "--external-id", "case-7", "--due", "2099-01-31", "--json"],
        )
    )
    assert added["record_ids"] == ["row-0", "row-1", "row-2"] and added["subjects"] == ["anna"]
    assert added["due_at"] == "2099-01-31T23:59:59.000000Z" and added["state"] == "received"
    shown = succeed(capsys, ["request", "show", "1", "--ledger", url]).out
    assert "received" in shown and "case-7" in shown and "anna" not in shown
    assert _json(succeed(capsys, ["request", "revoke", "1", "--ledger", url, "--json"]))["status"] == "denied"
    succeed(capsys, ["request", "add", "--ledger", url, "--subject", "[bold]bert[/bold]", "--external-id", "[red]x"])
    assert "[red]x" in succeed(capsys, ["request", "list", "--ledger", url]).out
    cancelled = succeed(capsys, ["request", "cancel", "2", "--reason", "exempt", "--ledger", url, "--json"])
    assert _json(cancelled)["outcome"] == "exempted"
    listed = _json(succeed(capsys, ["request", "list", "--ledger", url, "--state", "revoked", "--json"]))
    assert [request["number"] for request in listed] == [1]


def test_the_service_file_names_ledger_and_policy(capsys, tmp_path):
    service = tmp_path / "service.yaml"
    service.write_text(
        f"folder: {tmp_path}\njob: job.yaml\nkey: operator.key\nrequests: {{due_days: 3, delay_hours: 2.5}}\n"
    )
    added = _json(succeed(capsys, ["request", "add", "--service", str(service), "--subject", "a", "--json"]))
    assert (tmp_path / "ledger.db").exists()
    received, due = added["received_at"], added["due_at"]
    assert received[11:] == due[11:] and added["not_before"] > received


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "text"),
    [
        (["request", "add"], 12, "request", "0 ids"),
        (["request", "add", "--subject", " "], 12, "request", "control characters or blanks"),
        (["request", "add", "--subject", "a", "--due", "soon"], 12, "request", "ISO 8601"),
        (["request", "add", "--subject", "a", "--due", "1999-01-01"], 12, "request", "in the past"),
        (["request", "add", "--subject", "a", "--due", "2099-13-01"], 12, "request", "no date"),
        (["request", "add", "--file", "/nonexistent"], 4, "data", "cannot be read"),
        (["request", "show", "9"], 11, "ledger", "does not exist"),
        (["request", "list"], 11, "ledger", "does not exist"),
        (["verify"], 11, "ledger", "does not exist"),
    ],
)
def test_mistakes_end_in_one_error_and_make_no_ledger(capsys, url, arguments, code, kind, text):
    assert_refused(call(capsys, [*arguments, "--ledger", url]), code, kind, text)
    assert Path(url).exists() == ("past" in text), "only the ledger's clock knows what is past"


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["request", "show", "9"], 12, "request"),
        (["request", "revoke", "9"], 12, "request"),
        (["request", "list", "--state", "lost"], 12, "request"),
        (["verify", "--expect-head", "x"], 3, "configuration"),
        (["verify", "--expect-head", "999:" + "0" * 64], 9, "check"),
        (["verify", "--root", "/nonexistent"], 3, "configuration"),
        (["verify", "--key", "/nonexistent"], 3, "configuration"),
    ],
)
def test_mistakes_about_a_ledger_that_exists(capsys, url, arguments, code, kind):
    open_ledger(url, create=True)
    assert_refused(call(capsys, [*arguments, "--ledger", url]), code, kind)


def test_verify_names_what_is_broken_and_returns_9(capsys, url, tmp_path):
    for name in ("a", "b"):
        succeed(capsys, ["request", "add", "--ledger", url, "--record-id", name])
    ledger = open_ledger(url)
    lease = acquire(ledger, "node/0/test", 60)
    schedule_ripe(ledger, lease)
    start_round(ledger, lease, [1])
    (tmp_path / "states" / "round-0001").mkdir(parents=True)
    (tmp_path / "states" / "round-0001" / "model.safetensors").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of nothing
    commit_round(ledger, lease, 1, StateFiles("states/round-0001", empty, {"model.safetensors": empty}), {1: ["a"]})
    assert "the ledger verifies" in succeed(capsys, ["verify", "--ledger", url]).out
    assert _json(succeed(capsys, ["verify", "--ledger", url, "--json"]))["num_files"] == 1
    (tmp_path / "states" / "round-0001" / "model.safetensors").write_bytes(b"x")
    assert_refused(call(capsys, ["verify", "--ledger", url]), 9, "check", "round 1", "model.safetensors")
    with sqlite3.connect(url) as connection:
        connection.execute("UPDATE requests SET state = 'erased' WHERE id = 2")
    assert_refused(call(capsys, ["verify", "--ledger", url]), 9, "check", "request 2: its state")


def test_keys_are_made_once_and_for_their_owner(capsys, tmp_path):
    path = tmp_path / "operator.key"
    succeed(capsys, ["key", "generate", str(path)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and b"PRIVATE" in path.read_bytes()
    assert b"PRIVATE" not in path.with_suffix(".pub").read_bytes()
    assert_refused(call(capsys, ["key", "generate", str(path)]), 3, "configuration", "exists")
    assert_refused(call(capsys, ["key", "generate", "/nonexistent/x.key"]), 3, "configuration", "cannot be written")


def test_without_the_extra_there_is_one_clear_error(capsys, monkeypatch, url):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "alembic" else find(name))
    outcome = call(capsys, ["request", "list", "--ledger", url])
    assert_refused(outcome, 3, "configuration", "alembic", "distributed-unlearn[service]")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("folder: x\njob: j\nkey: k\nretries: 3\n", "retries"),
        ("job: j\nkey: k\n", "folder"),
        ("folder: x\njob: j\nkey: k\nschedule: {timezone: Mars/Base}\n", "schedule.timezone"),
        ("folder: x\njob: j\nkey: k\nwebhook: {url: 'http://example.org', secret_file: s}\n", "webhook.url"),
        ("folder: x\njob: j\nkey: k\nwebhook: {url: 'http://localhost.example.org', secret_file: s}\n", "webhook.url"),
        ("folder: x\njob: j\nkey: k\nrequests: {due_days: 0}\n", "requests.due_days"),
        ("folder: x\njob: j\nkey: k\ngates: {drift_nats: .nan}\n", "gates.drift_nats"),
        ("folder: ' '\njob: j\nkey: k\n", "folder is empty"),
        ("- a list", "without sections"),
        ("{", "not YAML"),
    ],
)
def test_malformed_service_files_are_refused(capsys, tmp_path, text, complaint):
    path = tmp_path / "service.yaml"
    path.write_text(text)
    assert_refused(call(capsys, ["request", "list", "--service", str(path)]), 3, "configuration", complaint)
