"""Passes of the service over rounds without a model: committed or rolled back, whole, once, whoever is killed when."""

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from sqlalchemy import select

from distributed_unlearn.config.service import GatesConfig, RetentionConfig, load_service
from distributed_unlearn.errors import ConfigError, LeaseError, NumericalError, WorkerError
from distributed_unlearn.service.certificate import verify_certificate
from distributed_unlearn.service.fault_points import VARIABLE
from distributed_unlearn.service.gates import failed_gates
from distributed_unlearn.service.keys import load_public_key
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.opening import opened
from distributed_unlearn.service.requests import NewRequest, add_request, get_request, list_requests
from distributed_unlearn.service.rounds_book import MAX_RESUMPTIONS, RoundState, erased_in_rounds, list_rounds
from distributed_unlearn.service.states import Reason, RequestState
from distributed_unlearn.service.tables import AUDIT, ERASED
from distributed_unlearn.service.verification import verify_ledger
from tests.cli.command_line import assert_refused, call, succeed
from tests.service.fake_round import (
    FakeRounds,
    ask_beside,
    interrupted_after_a_state,
    ledger_of,
    make_record,
    make_service,
    not_forgotten,
    one_pass,
    rising,
)


@pytest.fixture
def path(tmp_path):
    return make_service(tmp_path)


def _verified(path):
    found = verify_ledger(ledger_of(path), load_service(path, []).root, [load_public_key(path.parent / "operator.pub")])
    assert found.broken is None
    return found


def test_two_rounds_go_on_from_each_other_and_are_published(path, tmp_path):
    rounds, root = FakeRounds(), tmp_path / "service"
    ask_beside(path, subjects=("p0",))
    ask_beside(path, record_ids=("r4",))
    first = one_pass(path, rounds)
    assert first.round.state == RoundState.COMMITTED and first.certificates == (1, 2)
    assert rounds.jobs[0].forget.record_ids == ("r0", "r1", "r2", "r4") and rounds.jobs[0].save.dtype == "float32"
    assert rounds.jobs[0].model.path == str(tmp_path / "model")
    assert (root / "current" / "model.safetensors").read_text().endswith("without r0,r1,r2,r4")
    ask_beside(path, subjects=("p1",))
    second = one_pass(path, rounds)
    assert rounds.jobs[1].forget.record_ids == ("r3", "r5"), "r4 is erased already"
    assert Path(rounds.jobs[1].model.path).resolve() == (root / "states/round-0001/checkpoint").resolve()
    assert os.readlink(root / "current") == "states/round-0002/checkpoint"
    assert second.round.parent == 1 and one_pass(path, rounds).round is None and len(rounds.jobs) == 2
    assert _verified(path).last_signed is not None
    everything = "".join(p.read_text(errors="ignore") for p in root.rglob("*") if p.is_file())
    assert "secret answer" not in everything


def test_requests_that_need_no_round_are_answered_without_one(path):
    rounds = FakeRounds()
    ask_beside(path, record_ids=("r0",))
    one_pass(path, rounds)
    again = ask_beside(path, record_ids=("r0",))
    unknown = ask_beside(path, subjects=("nobody",))
    held_out = ask_beside(path, record_ids=("r11",))
    mixed = ask_beside(path, record_ids=("nothing", "r1", "r11"))
    found = one_pass(path, rounds)
    ledger = ledger_of(path)
    assert found.denied == (unknown, held_out) and rounds.jobs[-1].forget.record_ids == ("r1",)
    states = {
        n: (get_request(ledger, n).state, get_request(ledger, n).reason) for n in (again, unknown, held_out, mixed)
    }
    assert states == {
        again: (RequestState.ERASED, Reason.ALREADY_ERASED),
        unknown: (RequestState.DENIED, Reason.UNKNOWN_ID),
        held_out: (RequestState.DENIED, Reason.NOT_IN_TRAINING_DATA),
        mixed: (RequestState.ERASED, Reason.ROUND_COMMITTED),
    }
    assert get_request(ledger, again).duplicate_of == 1 and get_request(ledger, again).round_number == 1
    assert found.certificates == (again, unknown, held_out, mixed)


def test_every_certificate_verifies_and_says_what_became_of_the_request(path, tmp_path):
    ask_beside(path, record_ids=("r0",))
    ask_beside(path, subjects=("nobody",))
    one_pass(path, FakeRounds())
    key, folder = load_public_key(tmp_path / "operator.pub"), tmp_path / "service" / "certificates"
    outcomes = {}
    for number in (1, 2):
        statement = verify_certificate(folder / f"request-{number:06d}.json", [key])
        outcomes[number] = statement["predicate"]["answer"]["outcome"]
        assert f"request {number}" in (folder / f"request-{number:06d}.html").read_text()
    assert outcomes == {1: "deleted", 2: "not_found"}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (not_forgotten(), "are not forgotten; forgotten is required"),
        (not_forgotten("partly forgotten"), "are partly forgotten"),
        (not_forgotten("forgotten", earlier="not forgotten"), "1 of 1 earlier sets are not forgotten"),
        (rising(1.26), "rose by 0.260"),
        (rising(float("nan")), "the loss on retain is not finite"),
        (make_record(projection=0.5), "50.0% of the update"),
        (make_record(update_norm=float("inf")), "norm is not finite"),
    ],
)
def test_a_failed_gate_rolls_back_and_says_why(path, tmp_path, record, sentence):
    number = ask_beside(path, record_ids=("r0",))
    found = one_pass(path, FakeRounds(record))
    assert any(sentence in failed for failed in found.failed_gates)
    ledger, root = ledger_of(path), tmp_path / "service"
    assert list_rounds(ledger)[0].state == RoundState.ROLLED_BACK and sentence in list_rounds(ledger)[0].reason
    assert get_request(ledger, number).state == RequestState.SCHEDULED
    assert not (root / "current").exists() and list((root / "states").iterdir()) == []
    good = one_pass(path, FakeRounds())
    assert good.round.number == 2 and get_request(ledger, number).state == RequestState.ERASED
    _verified(path)


def test_gates_can_be_switched_off():
    off = GatesConfig(
        forgotten="not required",
        earlier_forgotten=False,
        retain_loss_nats=None,
        retain_memorisation=None,
        surviving_share=None,
    )
    assert failed_gates(off, not_forgotten(earlier="not forgotten")) == []
    assert failed_gates(off, rising(50.0)) == [] and failed_gates(off, make_record(projection=0.0)) == []
    partly = GatesConfig(forgotten="partly forgotten")
    assert failed_gates(partly, not_forgotten("partly forgotten")) == [] != failed_gates(partly, not_forgotten())


def test_drift_adds_up_over_committed_rounds_and_recommends_retraining(tmp_path):
    path = make_service(tmp_path, gates={"drift_nats": 0.3})
    for number, recommended in ((0, False), (1, True)):
        ask_beside(path, record_ids=(f"r{number}",))
        found = one_pass(path, FakeRounds(rising(1.2)))
        assert found.drift_nats == pytest.approx(0.2 * (number + 1)) and found.retraining_recommended == recommended


def test_a_round_that_ends_with_an_error_is_rolled_back_without_its_text(path):
    ask_beside(path, record_ids=("r0",))

    def broken(job):
        raise WorkerError("worker 1 with record r0", "x", "y")

    with pytest.raises(WorkerError):
        one_pass(path, broken)
    entry = list_rounds(ledger_of(path))[0]
    assert entry.state == RoundState.ROLLED_BACK and entry.reason == "the round was interrupted"
    with pytest.raises(SystemExit):
        one_pass(path, lambda job: sys.exit(143))
    assert [entry.state for entry in list_rounds(ledger_of(path))] == [RoundState.ROLLED_BACK] * 2
    assert one_pass(path, FakeRounds()).round.number == 3


def test_what_a_failed_round_wrote_is_removed_at_once(path, tmp_path):
    ask_beside(path, record_ids=("r0",))

    def broken(job):
        FakeRounds()(job)
        raise NumericalError("x", "y", "z")

    with pytest.raises(NumericalError):
        one_pass(path, broken)
    assert list((tmp_path / "service" / "states").iterdir()) == []


def test_what_was_committed_is_published_before_the_next_round_begins(path, tmp_path):
    ask_beside(path, record_ids=("r0",))
    one_pass(path, FakeRounds())
    (tmp_path / "service" / "current").unlink()  # as a kill between commit and publication leaves it
    ask_beside(path, record_ids=("r1",))
    with pytest.raises(SystemExit):
        one_pass(path, lambda job: sys.exit(143))
    assert os.readlink(tmp_path / "service" / "current") == "states/round-0001/checkpoint"


def test_an_open_round_whose_records_are_gone_is_rolled_back(path, tmp_path):
    number = ask_beside(path, record_ids=("r0",))
    with pytest.raises(SystemExit):
        one_pass(path, interrupted_after_a_state)
    data = tmp_path / "records.jsonl"
    data.write_text("\n".join(data.read_text().splitlines()[1:]) + "\n")
    found = one_pass(path, FakeRounds())
    assert (found.interrupted, found.round, found.denied, found.missing) == (1, None, (), (number,))
    _verified(path)


def test_a_round_with_a_state_is_gone_on_with(path):
    first = ask_beside(path, record_ids=("r0",))
    with pytest.raises(SystemExit):
        one_pass(path, interrupted_after_a_state)
    assert get_request(ledger_of(path), first).state == RequestState.IN_ROUND
    second, rounds = ask_beside(path, record_ids=("r1",)), FakeRounds()
    found = one_pass(path, rounds)
    assert rounds.jobs[0].resume and rounds.jobs[0].forget.record_ids == ("r0",)
    assert found.round.number == 1 and found.interrupted is None and found.certificates == (first,)
    assert get_request(ledger_of(path), second).state == RequestState.SCHEDULED, "it waits for the next round"
    assert one_pass(path, rounds).round.number == 2 and not rounds.jobs[1].resume
    _verified(path)


def test_a_round_that_is_interrupted_for_ever_is_rolled_back(path):
    ask_beside(path, record_ids=("r0",))
    for _ in range(1 + MAX_RESUMPTIONS):
        with pytest.raises(SystemExit):
            one_pass(path, interrupted_after_a_state)
        assert list_rounds(ledger_of(path))[-1].state == RoundState.STARTED
    found = one_pass(path, FakeRounds())
    assert found.interrupted == 1 and found.round.number == 2
    _verified(path)


def test_old_states_go_and_the_current_one_stays(tmp_path):
    path = make_service(tmp_path, retention={"keep_states": 2})
    for number in range(4):
        ask_beside(path, record_ids=(f"r{number}",))
        one_pass(path, FakeRounds())
    states = sorted(p.name for p in (tmp_path / "service" / "states").iterdir())
    assert states == ["round-0003", "round-0004"]
    with ledger_of(path).read() as connection:
        events = connection.execute(select(AUDIT.c.event)).scalars().all()
    assert events.count("state_purged") == 2
    _verified(path)


def test_states_that_know_what_was_erased_since_go_after_their_time(tmp_path):
    path = make_service(tmp_path, retention={"superseded_days": 0.0})
    for number in range(2):
        ask_beside(path, record_ids=(f"r{number}",))
        one_pass(path, FakeRounds())
    assert [p.name for p in (tmp_path / "service" / "states").iterdir()] == ["round-0002"]
    assert RetentionConfig().superseded_days == 30.0


def test_two_passes_at_once_are_refused(path):
    ask_beside(path, record_ids=("r0",))
    with opened(load_service(path, [])):
        with pytest.raises(LeaseError):
            one_pass(path, FakeRounds())
    assert list_rounds(ledger_of(path)) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("forget: {subjects: [p0]}", "with forget"),
        ("train: {epochs: 1}", "with forget, rounds or train"),
        ("save: {dtype: bfloat16}", "save.dtype bfloat16"),
        ("nonsense: 1", "nonsense"),
        ("holdout: null", "need a holdout selection"),
    ],
)
def test_jobs_that_no_service_can_run_are_refused_before_the_ledger_is_made(path, tmp_path, change, complaint):
    job = {**yaml.safe_load((tmp_path / "job.yaml").read_text()), **yaml.safe_load(change)}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    with pytest.raises(ConfigError, match=complaint):
        one_pass(path, FakeRounds())
    assert not (tmp_path / "service").exists()


def test_an_overdue_request_is_audited_once(tmp_path):
    path = make_service(tmp_path, gates={"forgotten": "forgotten"})
    config = load_service(path, [])
    config.root.mkdir()
    past = open_ledger(config.ledger_url, create=True, clock=lambda: datetime(2020, 1, 1, tzinfo=UTC))
    add_request(past, NewRequest(record_ids=("r0",)), config.requests)
    for _ in range(2):
        one_pass(path, FakeRounds(not_forgotten()))
    assert list_requests(ledger_of(path))[0].status == "expired"
    with ledger_of(path).read() as connection:
        events = connection.execute(select(AUDIT.c.event)).scalars().all()
    assert events.count("request_overdue") == 1


def _killed_pass(path: Path, points: int) -> bool:
    """A pass in a process of its own that is killed at its fault point `points`; whether it lived to its end."""
    child = os.fork()
    if child == 0:
        try:
            os.environ[VARIABLE] = str(points)
            one_pass(path, FakeRounds())
            os._exit(0)
        except BaseException:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return not os.WIFSIGNALED(status)


def _assert_nothing_half(path: Path) -> None:
    """At any instant: the trail verifies, what is committed is whole, and `current` is a committed state."""
    root = load_service(path, []).root
    _verified(path)
    if (root / "current").is_symlink():
        committed = {e.folder for e in list_rounds(ledger_of(path)) if e.state == RoundState.COMMITTED}
        assert os.path.dirname(os.readlink(root / "current")) in committed
        assert {p.name for p in (root / "current").iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.slow
def test_a_pass_that_is_killed_at_any_of_its_writes_is_gone_on_with(tmp_path):
    """Each pass is killed one fault point later than the one before, until one lives; then everything is done once."""
    path = make_service(tmp_path, retention={"keep_states": 1})
    numbers = [ask_beside(path, record_ids=("r0", "r1")), ask_beside(path, subjects=("nobody",))]
    one_pass(path, FakeRounds())  # so that there is a parent, and a state to purge
    numbers += [
        ask_beside(path, record_ids=("r3",)),
        ask_beside(path, record_ids=("r0", "r4")),
        ask_beside(path, record_ids=("r11",)),
    ]
    kills = 0
    while not _killed_pass(path, kills):
        kills += 1
        _assert_nothing_half(path)
        assert kills < 300
    assert kills > 30, "there are that many points at least"
    ledger, root = ledger_of(path), tmp_path / "service"
    assert [get_request(ledger, n).state.value for n in numbers] == ["erased", "denied", "erased", "erased", "denied"]
    with ledger.read() as connection:
        rows = connection.execute(select(ERASED.c.record_id, ERASED.c.request_id).order_by(ERASED.c.record_id)).all()
    assert [tuple(row) for row in rows] == [("r0", 1), ("r1", 1), ("r3", 3), ("r4", 4)], "each record once"
    assert len(erased_in_rounds(ledger)) == 4
    committed = [entry for entry in list_rounds(ledger) if entry.state == RoundState.COMMITTED]
    assert len(committed) == 2 and [p.name for p in (root / "states").iterdir()] == [f"round-{committed[1].number:04d}"]
    key = load_public_key(tmp_path / "operator.pub")
    for number in numbers:
        verify_certificate(root / "certificates" / f"request-{number:06d}.json", [key])
    left = [p.name for p in root.rglob(".*") if p.name != "." and not p.name.startswith("ledger")]
    assert left == []
    _assert_nothing_half(path)


def test_a_reader_never_sees_a_mixture(path, tmp_path):
    """A process reads `current` again and again while rounds are committed and published."""
    ask_beside(path, record_ids=("r0",))
    one_pass(path, FakeRounds())
    pointer, seen = tmp_path / "service" / "current", tmp_path / "seen"
    child = os.fork()
    if child == 0:
        found, deadline = set(), time.monotonic() + 60
        try:
            while not (tmp_path / "stop").exists() and time.monotonic() < deadline:
                state = os.path.realpath(pointer)  # opened once, as a reader should
                found.add((os.path.basename(os.path.dirname(state)), Path(state, "model.safetensors").read_text()))
            seen.write_text(json.dumps(sorted(found)))
            os._exit(0)
        except BaseException:
            os._exit(3)
    for number in range(1, 4):
        ask_beside(path, record_ids=(f"r{number}",))
        one_pass(path, FakeRounds())
    (tmp_path / "stop").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    states = json.loads(seen.read_text())
    for name, content in states:
        number = int(name.removeprefix("round-"))
        assert content.endswith(f"without r{number - 1}")
    assert len({name for name, _ in states}) == len(states)


def test_status_is_one_screen_about_everything(path, capsys):
    ask_beside(path, record_ids=("r0",))
    ask_beside(path, subjects=("nobody",))
    one_pass(path, FakeRounds(not_forgotten()))
    ask_beside(path, record_ids=("r1",))
    shown = succeed(capsys, ["status", str(path)]).out
    for text in ("1 denied, 1 received, 1 scheduled", "rolled back", "are not forgotten", "not_found", "03:00 UTC"):
        assert text in shown
    found = json.loads(succeed(capsys, ["status", str(path), "--json"]).out)
    assert found["num_by_state"] == {"denied": 1, "received": 1, "scheduled": 1}
    assert found["oldest_open_seconds"] > 0 and found["current"] is None and found["holder"] is None
    one_pass(path, FakeRounds())
    assert "round 2" in succeed(capsys, ["status", str(path)]).out
    path.write_text(path.read_text() + "schedule: {cron: never}\n")
    assert_refused(call(capsys, ["status", str(path)]), 3, "configuration", "schedule.cron")
