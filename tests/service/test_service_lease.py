"""The lease: one scheduler at a time, and one that was paused while another took over writes nothing."""

import os
import platform
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from sqlalchemy import select

from distributed_unlearn.config.service import RequestsConfig, RetentionConfig
from distributed_unlearn.errors import LeaseError
from distributed_unlearn.service import lease as leases
from distributed_unlearn.service.heads import read_head
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.requests import NewRequest, add_request, list_requests
from distributed_unlearn.service.retention import purge, sweep
from distributed_unlearn.service.rounds_book import (
    StateFiles,
    commit_round,
    deny,
    open_round,
    roll_back,
    schedule_ripe,
    start_round,
)
from distributed_unlearn.service.states import Reason, RequestState
from distributed_unlearn.service.tables import AUDIT
from distributed_unlearn.service.verification import verify_ledger
from tests.service.conftest import BOTH

ELSEWHERE = "another-machine/1/x"


@BOTH
def test_one_holder_at_a_time(ledger, clock):
    lease = leases.acquire(ledger, ELSEWHERE, 60)
    with pytest.raises(LeaseError, match="another-machine"):
        leases.acquire(ledger, "b/1/x", 60)
    clock.advance(seconds=59)
    leases.renew(ledger, lease)
    clock.advance(seconds=59)
    with pytest.raises(LeaseError):
        leases.acquire(ledger, "b/1/x", 60)
    leases.release(ledger, lease)
    assert leases.acquire(ledger, "b/1/x", 60).token == lease.token + 1


@BOTH
def test_a_holder_that_was_paused_writes_nothing(ledger, clock, tmp_path):
    add_request(ledger, NewRequest(record_ids=("a",)), RequestsConfig())
    add_request(ledger, NewRequest(record_ids=("b",)), RequestsConfig())
    old = leases.acquire(ledger, ELSEWHERE, 60)
    schedule_ripe(ledger, old)
    start_round(ledger, old, [1])
    clock.advance(seconds=61)
    leases.acquire(ledger, "b/1/x", 60)
    head = read_head(ledger)
    state = StateFiles("states/round-0001", "0" * 64, {})
    (tmp_path / "states" / "round-0007").mkdir(parents=True)
    for attempt in (
        lambda: commit_round(ledger, old, 1, state, {1: ["a"]}),
        lambda: roll_back(ledger, old, 1, Reason.GATE_FAILED, "no"),
        lambda: start_round(ledger, old, [2]),
        lambda: schedule_ripe(ledger, old),
        lambda: deny(ledger, old, {2: Reason.UNKNOWN_ID}, {}),
        lambda: purge(ledger, old, RetentionConfig(), tmp_path),
        lambda: sweep(ledger, old, tmp_path),
        lambda: leases.renew(ledger, old),
    ):
        with pytest.raises(LeaseError, match="not the ledger's any more"):
            attempt()
    leases.release(ledger, old)
    assert read_head(ledger) == head and (tmp_path / "states" / "round-0007").is_dir()
    with pytest.raises(LeaseError):
        leases.acquire(ledger, "c/1/x", 60)


def test_a_clock_that_went_back_does_not_keep_a_dead_holder_for_ever(ledger, clock):
    leases.acquire(ledger, ELSEWHERE, 60)
    clock.advance(seconds=-59)
    with pytest.raises(LeaseError):
        leases.acquire(ledger, "b/1/x", 60)
    clock.advance(days=-300)
    assert leases.acquire(ledger, "b/1/x", 60).token == 2


def test_a_dead_process_of_this_machine_is_not_waited_for(ledger):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    leases.acquire(ledger, f"{platform.node()}/{process.pid}/x", 10**6)
    assert leases.acquire(ledger, f"{platform.node()}/{os.getpid()}/x", 10**6).token == 2
    with pytest.raises(LeaseError):
        leases.acquire(ledger, f"{platform.node()}/{os.getpid()}/y", 60)


def test_the_keeper_renews_and_finds_out_that_it_lost(database):
    ledger = open_ledger(database, create=True)
    with leases.held(ledger, 1, ELSEWHERE) as keeper:
        time.sleep(1.5)
        keeper.require()
        with pytest.raises(LeaseError):
            leases.acquire(ledger, "b/1/x", 1)
        ahead = open_ledger(database, clock=lambda: ledger.clock() + timedelta(seconds=2))
        leases.acquire(ahead, "b/1/x", 1)
        deadline = time.monotonic() + 20
        with pytest.raises(LeaseError):
            while time.monotonic() < deadline:
                keeper.require()
                time.sleep(0.05)


COUNTING = """
import sys, time
from distributed_unlearn.errors import LeaseError
from distributed_unlearn.service.lease import held
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.rounds_book import *
from distributed_unlearn.service.states import Reason
ledger = open_ledger(sys.argv[1])
done = 0
while done < 5:
    try:
        with held(ledger, 30) as keeper:
            number = start_round(ledger, keeper.lease, [1]).number
            time.sleep(0.01)
            roll_back(ledger, keeper.lease, number, Reason.GATE_FAILED, "no")
            done += 1
    except LeaseError:
        time.sleep(0.005)
"""


@BOTH
def test_two_schedulers_never_have_a_round_at_once(ledger, database):
    add_request(ledger, NewRequest(record_ids=("a",)), RequestsConfig())
    first = leases.acquire(ledger, ELSEWHERE, 60)
    schedule_ripe(ledger, first)
    leases.release(ledger, first)
    started = [subprocess.Popen([sys.executable, "-c", COUNTING, database]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    with ledger.read() as connection:
        events = connection.execute(select(AUDIT.c.event).order_by(AUDIT.c.seq)).scalars()
        rounds = [event for event in events if event.startswith("round_")]
    assert rounds == ["round_started", "round_rolled_back"] * 10
    assert verify_ledger(ledger, None, []).broken is None


PAUSED = """
import sys
from distributed_unlearn.service.lease import held
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.rounds_book import *
ledger = open_ledger(sys.argv[1])
with held(ledger, 1, "another-machine/2/y") as keeper:
    number = start_round(ledger, keeper.lease, [1]).number
    sys.stdout.write("started\\n"); sys.stdout.flush()
    sys.stdin.readline()
    commit_round(ledger, keeper.lease, number, StateFiles("states/round-0001", "0" * 64, {}), {1: ["a"]})
"""


@BOTH
def test_a_process_that_is_stopped_and_goes_on_later_is_refused(database):
    ledger = open_ledger(database, create=True)
    add_request(ledger, NewRequest(record_ids=("a",)), RequestsConfig())
    first = leases.acquire(ledger, ELSEWHERE, 60)
    schedule_ripe(ledger, first)
    leases.release(ledger, first)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, database], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    try:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGSTOP)
        deadline, lease = time.monotonic() + 30, None
        while lease is None:
            assert time.monotonic() < deadline
            try:
                lease = leases.acquire(ledger, "b/1/x", 60)
            except LeaseError:
                time.sleep(0.1)
        roll_back(ledger, lease, open_round(ledger).number, Reason.INTERRUPTED, "its driver is silent")
        head = read_head(ledger)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate("go on\n", timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "LeaseError" in errors
    assert read_head(ledger) == head and list_requests(ledger)[0].state == RequestState.SCHEDULED
