"""Requests: idempotent, linked, dated, projected, and moved only as the table of transitions says."""

import itertools
from datetime import timedelta

import pytest
from sqlalchemy import select

from distributed_unlearn.config.service import RequestsConfig, RetentionConfig
from distributed_unlearn.errors import RequestError
from distributed_unlearn.service.lease import acquire
from distributed_unlearn.service.requests import (
    NewRequest,
    add_request,
    get_request,
    list_requests,
    move,
    withdraw,
)
from distributed_unlearn.service.retention import purge
from distributed_unlearn.service.rounds_book import (
    StateFiles,
    commit_round,
    deny,
    erased_in_rounds,
    roll_back,
    schedule_ripe,
    start_round,
)
from distributed_unlearn.service.states import (
    FINAL_STATES,
    TRANSITIONS,
    Outcome,
    PublicStatus,
    Reason,
    RequestState,
    public_status,
)
from distributed_unlearn.service.tables import ERASED, NAMES, REQUESTS
from distributed_unlearn.service.verification import verify_ledger
from tests.service.conftest import BOTH

POLICY = RequestsConfig(delay_hours=24)


def _scheduled(ledger, clock, *ids: str):
    numbers = [add_request(ledger, NewRequest(record_ids=(name,)), POLICY).number for name in ids]
    clock.advance(hours=24)
    lease = acquire(ledger, "node/0/test", 10**6)
    assert schedule_ripe(ledger, lease) == numbers
    return lease, numbers


@BOTH
def test_an_external_id_makes_a_request_idempotent(ledger):
    first = add_request(ledger, NewRequest(subjects=("anna",), external_id="case-1"), POLICY)
    again = add_request(ledger, NewRequest(subjects=("anna", "anna"), external_id="case-1"), POLICY)
    assert again == first and len(list_requests(ledger)) == 1
    with pytest.raises(RequestError, match="with other ids") as refused:
        add_request(ledger, NewRequest(subjects=("bert",), external_id="case-1"), POLICY)
    assert "case-1" not in str(refused.value) and "bert" not in str(refused.value)


@BOTH
def test_duplicates_are_linked_and_kept(ledger):
    add_request(ledger, NewRequest(subjects=("anna",), record_ids=("r1",)), POLICY)
    same = add_request(ledger, NewRequest(record_ids=("r1",)), POLICY)
    more = add_request(ledger, NewRequest(record_ids=("r1", "r2")), POLICY)
    subject_named_like_a_record = add_request(ledger, NewRequest(subjects=("r1",)), POLICY)
    assert (same.duplicate_of, more.duplicate_of, subject_named_like_a_record.duplicate_of) == (1, None, None)
    withdraw(ledger, 1, Reason.WITHDRAWN, RequestState.REVOKED)
    assert add_request(ledger, NewRequest(subjects=("anna",)), POLICY).duplicate_of is None, "of a withdrawn one"


def test_dates_follow_the_policy(ledger, clock):
    plain = add_request(ledger, NewRequest(subjects=("a",)), POLICY)
    california = add_request(ledger, NewRequest(subjects=("b",), policy="california"), POLICY)
    given = add_request(ledger, NewRequest(subjects=("c",), due=clock.now + timedelta(days=3)), POLICY)
    assert [r.due_at - r.received_at for r in (plain, california, given)] == [timedelta(days=d) for d in (30, 45, 3)]
    assert plain.not_before - plain.received_at == timedelta(hours=24)
    with pytest.raises(RequestError, match="in the past"):
        add_request(ledger, NewRequest(subjects=("d",), due=clock.now), POLICY)


def test_the_delay_can_be_used_to_withdraw(ledger, clock):
    add_request(ledger, NewRequest(subjects=("a",)), POLICY)
    add_request(ledger, NewRequest(subjects=("b",)), POLICY)
    lease = acquire(ledger, "node/0/test", 10**6)
    clock.advance(hours=23.9)
    assert schedule_ripe(ledger, lease) == []
    withdraw(ledger, 1, Reason.WITHDRAWN, RequestState.REVOKED)
    clock.advance(hours=0.2)
    assert schedule_ripe(ledger, lease) == [2]


def test_a_clock_that_goes_back_loses_nothing(ledger, clock):
    lease, (first,) = _scheduled(ledger, clock, "a")
    clock.advance(days=-400)
    second = add_request(ledger, NewRequest(record_ids=("b",)), POLICY)
    assert second.received_at == clock.now and not second.overdue
    start_round(ledger, lease, [first])
    roll_back(ledger, lease, 1, Reason.GATE_FAILED, "no")
    assert get_request(ledger, first).state == RequestState.SCHEDULED
    assert verify_ledger(ledger, None, []).broken is None


def test_every_move_that_is_not_in_the_table_is_refused(ledger):
    number = add_request(ledger, NewRequest(subjects=("a",)), POLICY).number
    reachable = {RequestState.RECEIVED: []}
    frontier = [RequestState.RECEIVED]
    while frontier:  # a path of transitions to every state
        source = frontier.pop()
        for transition in TRANSITIONS:
            if transition.source == source and transition.target not in reachable:
                reachable[transition.target] = [*reachable[source], transition]
                frontier.append(transition.target)
    assert reachable.keys() == set(RequestState)
    allowed = {(t.source, t.target, reason) for t in TRANSITIONS for reason in t.reasons}
    for state, path in reachable.items():

        class UndoneError(Exception):
            pass

        for target, reason in itertools.product(RequestState, Reason):
            with pytest.raises(UndoneError), ledger.write() as writing:
                for transition in path:
                    move(writing, number, transition.target, min(transition.reasons))
                if (state, target, reason) in allowed:
                    move(writing, number, target, reason)
                else:
                    with pytest.raises(RequestError, match=f"which is {state.value}"):
                        move(writing, number, target, reason)
                raise UndoneError


def test_projection_and_outcomes(ledger, clock):
    lease, numbers = _scheduled(ledger, clock, "a", "b", "c", "d", "e")
    withdraw(ledger, numbers[1], Reason.EXEMPT, RequestState.CANCELLED)
    withdraw(ledger, numbers[2], Reason.WITHDRAWN, RequestState.REVOKED)
    deny(ledger, lease, {numbers[3]: Reason.UNKNOWN_ID}, {})
    start_round(ledger, lease, numbers[:1])
    assert get_request(ledger, numbers[0]).status == PublicStatus.IN_PROGRESS
    with pytest.raises(RequestError, match="in_round"):
        withdraw(ledger, numbers[0], Reason.WITHDRAWN, RequestState.REVOKED)
    commit_round(ledger, lease, 1, StateFiles("states/round-0001", "0" * 64, {}), {numbers[0]: ["a"]})
    found = [get_request(ledger, number) for number in numbers]
    assert [(r.status, r.outcome) for r in found] == [
        (PublicStatus.FULFILLED, Outcome.DELETED),
        (PublicStatus.DENIED, Outcome.EXEMPTED),
        (PublicStatus.DENIED, None),
        (PublicStatus.DENIED, Outcome.NOT_FOUND),
        (PublicStatus.OPEN, None),
    ]
    clock.advance(days=31)
    assert get_request(ledger, numbers[4]).status == PublicStatus.EXPIRED and get_request(ledger, numbers[4]).overdue
    assert not get_request(ledger, numbers[0]).overdue
    assert all(public_status(state, True) != PublicStatus.EXPIRED for state in FINAL_STATES)


@pytest.mark.parametrize(
    "asked",
    [
        dict(),
        dict(subjects=("",)),
        dict(subjects=(" a",)),
        dict(record_ids=("a\nb",)),
        dict(record_ids=("a\x00b",)),
        dict(record_ids=("\udcff",)),
        dict(record_ids=("x" * 501,)),
        dict(subjects=("a",), external_id=""),
        dict(subjects=("a",), external_id="e" * 201),
        dict(record_ids=tuple(map(str, range(100_001)))),
    ],
)
def test_malformed_ids_are_refused_without_being_repeated(asked):
    with pytest.raises(RequestError) as refused:
        NewRequest(**asked)
    assert "a\nb" not in str(refused.value) and "xxx" not in str(refused.value)


@pytest.mark.parametrize("number", [0, -1, 2, 2**31, 10**30])
@BOTH
def test_unknown_numbers_are_refused(ledger, number):
    add_request(ledger, NewRequest(subjects=("a",)), POLICY)
    with pytest.raises(RequestError, match="does not exist"):
        get_request(ledger, number)
    with pytest.raises(RequestError, match="does not exist"):
        withdraw(ledger, number, Reason.MISTAKEN, RequestState.CANCELLED)


@BOTH
def test_ids_are_purged_in_their_time_and_what_was_erased_is_still_known(ledger, clock, tmp_path):
    lease, (first, second) = _scheduled(ledger, clock, "a", "b")
    start_round(ledger, lease, [first])
    commit_round(ledger, lease, 1, StateFiles("states/round-0001", "0" * 64, {}), {first: ["a"]})
    policy = RetentionConfig(ids_days=10)
    clock.advance(days=9)
    assert purge(ledger, lease, policy, tmp_path).requests == ()
    clock.advance(days=1)
    assert purge(ledger, lease, policy, tmp_path).requests == (first,)
    assert purge(ledger, lease, policy, tmp_path).requests == ()
    with ledger.read() as connection:
        assert connection.execute(select(NAMES.c.name).order_by(NAMES.c.request_id)).scalars().all() == [None, "b"]
        assert connection.execute(select(ERASED.c.record_id)).scalars().all() == [None]
        assert connection.execute(select(REQUESTS.c.external_id)).scalars().all() == [None, None]
    with ledger.write() as writing:
        digest = writing.hash_name("record", "a")
    assert erased_in_rounds(ledger) == {digest: 1}
    assert add_request(ledger, NewRequest(record_ids=("a",)), POLICY).duplicate_of == first
    assert verify_ledger(ledger, None, []).broken is None


def test_purged_ids_are_in_no_file_of_the_ledger(tmp_path, database, ledger, clock):
    marker = "a-name-that-nobody-has"
    number = add_request(
        ledger, NewRequest(record_ids=(marker,), external_id=marker + "-e"), POLICY, webhook=True
    ).number
    withdraw(ledger, number, Reason.WITHDRAWN, RequestState.REVOKED)
    clock.advance(days=366)
    purge(ledger, acquire(ledger, "node/0/test", 60), RetentionConfig(), tmp_path)
    assert all(marker.encode() not in path.read_bytes() for path in tmp_path.glob("ledger.db*"))
