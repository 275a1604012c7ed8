"""What requests name and what the data holds: records that left it, that were erased before, that are dropped."""

import json
from pathlib import Path

import pytest
import yaml

from distributed_unlearn.service.requests import get_request
from distributed_unlearn.service.states import Reason, RequestState
from tests.service.fake_round import FakeRounds, ask_beside, ledger_of, make_service, one_pass


@pytest.fixture
def path(tmp_path):
    return make_service(tmp_path)


def _records_without(path: Path, *ids: str) -> None:
    records = path.parent / "records.jsonl"
    lines = [line for line in records.read_text().splitlines() if json.loads(line)["record_id"] not in ids]
    records.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("asked", [{"record_ids": ("r1", "r3")}, {"subjects": ("p0",)}])
def test_a_record_that_left_the_data_before_its_round_is_not_called_unknown(path, asked):
    ask_beside(path, subjects=("nobody",))
    one_pass(path, FakeRounds())  # which sees the data
    whole = (path.parent / "records.jsonl").read_text()
    _records_without(path, "r1")
    waiting, other = ask_beside(path, **asked), ask_beside(path, record_ids=("r4",))
    rounds = FakeRounds()
    found = one_pass(path, rounds)
    ledger = ledger_of(path)
    assert found.missing == (waiting,) and found.denied == () and rounds.jobs[0].forget.record_ids == ("r4",)
    assert get_request(ledger, waiting).state == RequestState.SCHEDULED
    assert get_request(ledger, other).state == RequestState.ERASED, "nobody else waits"
    assert b"r1" not in (path.parent / "service" / "seen.hashes").read_bytes()
    (path.parent / "records.jsonl").write_text(whole)
    assert one_pass(path, rounds).missing == () and "r1" in rounds.jobs[1].forget.record_ids
    assert get_request(ledger, waiting).state == RequestState.ERASED


def test_what_was_erased_and_then_left_the_data_is_known_by_its_subject(path):
    ask_beside(path, subjects=("p0",))
    one_pass(path, FakeRounds())
    _records_without(path, "r0", "r1", "r2")
    again = ask_beside(path, subjects=("p0",))
    found, request = one_pass(path, FakeRounds()), get_request(ledger_of(path), again)
    assert found.missing == () and (request.state, request.reason) == (RequestState.ERASED, Reason.ALREADY_ERASED)


def test_a_record_that_is_dropped_as_too_long_blocks_nobody(path, tiny):
    """It counts as never trained on, as it is by a training with these settings."""
    job = yaml.safe_load((path.parent / "job.yaml").read_text())
    job["model"]["path"], job["data"]["too_long"], job["data"]["max_length"] = str(tiny.model), "drop", 64
    (path.parent / "job.yaml").write_text(yaml.safe_dump(job))
    records = path.parent / "records.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[1]["answer"] = "a long answer " * 40
    records.write_text("\n".join(map(json.dumps, lines)) + "\n")
    long, other = ask_beside(path, record_ids=("r1",)), ask_beside(path, subjects=("p0",))
    rounds = FakeRounds()
    found = one_pass(path, rounds)
    assert found.denied == (long,) and rounds.jobs[0].forget.record_ids == ("r0", "r2")
    assert get_request(ledger_of(path), long).reason == Reason.NOT_IN_TRAINING_DATA
    assert get_request(ledger_of(path), other).state == RequestState.ERASED
