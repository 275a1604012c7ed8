"""The schedule: ticks in their time zone, each taken once, missed ones together; due dates that press; restarts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from distributed_unlearn.commands import rounds
from distributed_unlearn.config.service import RequestsConfig, ScheduleConfig, ServiceConfig
from distributed_unlearn.errors import ConfigError, LeaseError
from distributed_unlearn.service.lease import acquire
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.requests import NewRequest, add_request
from distributed_unlearn.service.rounds_book import roll_back, schedule_ripe, start_round
from distributed_unlearn.service.schedule import (
    cron_trigger,
    find_due,
    last_taken,
    latest_tick,
    next_tick,
    parse_tick,
    take_tick,
    tick_name,
)
from distributed_unlearn.service.states import Reason
from distributed_unlearn.service.verification import verify_ledger
from tests.service.conftest import BOTH
from tests.service.fake_round import make_service


def _config(**schedule) -> ServiceConfig:
    return ServiceConfig(folder="f", job="j", key="k", schedule=ScheduleConfig(**schedule))


def test_ticks_follow_the_clock_of_their_zone_also_when_it_changes():
    trigger = cron_trigger(ScheduleConfig(cron="30 3 * * *", timezone="Europe/Berlin"))
    ticks, at = [], datetime(2026, 3, 27, 12, tzinfo=UTC)
    for _ in range(3):
        at = next_tick(trigger, at)
        ticks.append(tick_name(at))
    assert ticks == ["20260328T023000Z", "20260329T013000Z", "20260330T013000Z"]
    # In October the hour from 2 to 3 comes twice, and so does its tick: two names, and the second finds nothing to do.
    trigger = cron_trigger(ScheduleConfig(cron="30 2 * * *", timezone="Europe/Berlin"))
    after = datetime(2026, 10, 24, 12, tzinfo=UTC)
    first = next_tick(trigger, after)
    assert next_tick(trigger, first) - first == timedelta(hours=1)


@pytest.mark.parametrize("cron", ["", "* * * *", "61 * * * *", "every night", "* * * * * *"])
def test_expressions_that_are_none_are_refused(cron):
    with pytest.raises(ConfigError, match="schedule.cron"):
        cron_trigger(ScheduleConfig(cron=cron))


@pytest.mark.parametrize("name", ["", "now", "20261301T000000Z", "20260101T000000", "2026-01-01T00:00:00Z"])
def test_names_that_are_no_tick_are_refused(name):
    with pytest.raises(ConfigError, match="tick"):
        parse_tick(name)


def test_missed_ticks_are_one():
    trigger, now = cron_trigger(ScheduleConfig(cron="0 * * * *")), datetime(2026, 3, 9, 12, 30, tzinfo=UTC)
    assert latest_tick(trigger, now - timedelta(days=9), now) == datetime(2026, 3, 9, 12, tzinfo=UTC)
    assert latest_tick(trigger, now - timedelta(minutes=30), now) is None
    assert latest_tick(trigger, now + timedelta(days=1), now) is None, "a clock that went back"


@BOTH
def test_a_tick_is_taken_once_and_only_under_the_lease(ledger, clock):
    lease = acquire(ledger, "m/1/x", 60)
    assert last_taken(ledger) == clock.now
    assert take_tick(ledger, lease, "20260302T030000Z")
    assert not take_tick(ledger, lease, "20260302T030000Z") and not take_tick(ledger, lease, "20260301T030000Z")
    assert last_taken(ledger) == datetime(2026, 3, 2, 3, tzinfo=UTC)
    clock.advance(seconds=61)
    acquire(ledger, "n/1/x", 60)
    with pytest.raises(LeaseError):
        take_tick(ledger, lease, "20260303T030000Z")
    assert verify_ledger(ledger, None, []).broken is None


def test_what_is_due(ledger, clock):  # the clock begins on 1 March, 12:00
    config, lease = _config(cron="0 3 * * *", min_requests=2), acquire(ledger, "m/1/x", 10**7)
    trigger, policy = cron_trigger(config.schedule), RequestsConfig(delay_hours=1)
    assert find_due(ledger, config, trigger) is None
    add_request(ledger, NewRequest(record_ids=("a",)), policy)
    clock.advance(hours=16)
    due = find_due(ledger, config, trigger)
    assert due is not None and due.tick == "20260302T030000Z" and not due.runs, "one request, two are wanted"
    take_tick(ledger, lease, due.tick)
    add_request(ledger, NewRequest(record_ids=("b",)), policy)
    assert find_due(ledger, config, trigger) is None
    clock.advance(hours=24)
    assert find_due(ledger, config, trigger).runs
    take_tick(ledger, lease, "20260303T030000Z")
    clock.advance(days=21.5)
    take_tick(ledger, lease, "20260324T030000Z")
    due = find_due(ledger, config, trigger)
    assert due.tick is None and "request 1 is due soon" in due.why, "seven days before its due date"


def test_due_dates_press_once_between_ticks(ledger, clock):
    config, lease = _config(cron="0 3 1 * *"), acquire(ledger, "m/1/x", 10**7)
    trigger = cron_trigger(config.schedule)
    due_at = clock.now + timedelta(days=3)
    add_request(ledger, NewRequest(record_ids=("a",), due=due_at), RequestsConfig(delay_hours=1))
    assert find_due(ledger, config, trigger) is None, "it can still be withdrawn"
    clock.advance(hours=2)
    assert find_due(ledger, config, trigger).tick is None
    schedule_ripe(ledger, lease)
    number = start_round(ledger, lease, [1]).number
    assert find_due(ledger, config, trigger).why == "a round was left open"
    roll_back(ledger, lease, number, Reason.GATE_FAILED, "no")
    clock.advance(days=10)
    assert find_due(ledger, config, trigger) is None, "it was tried, and waits for the next tick"
    clock.advance(days=21)
    assert find_due(ledger, config, trigger).runs


@pytest.mark.slow
def test_the_scheduler_runs_passes_of_its_own_and_ends_with_a_signal(tmp_path):
    """A request that names nobody needs no model: the pass denies it. Every second has a chance, by the due date."""
    path = make_service(tmp_path, schedule={"cron": "0 0 1 1 *", "watch_minutes": 0.02}, lease_seconds=5)
    command = [sys.executable, "-m", "distributed_unlearn"]
    added = [*command, "request", "add", "--service", str(path), "--subject", "nobody", "--json"]
    soon = (datetime.now(UTC) + timedelta(days=2)).isoformat()
    assert json.loads(subprocess.run([*added, "--due", soon], capture_output=True, check=True).stdout)["number"] == 1
    process = subprocess.Popen([*command, "rounds", "schedule", str(path)], stdout=subprocess.PIPE, text=True)
    try:
        certificate, deadline = tmp_path / "service" / "certificates" / "request-000001.json", time.monotonic() + 240
        while not certificate.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 0 and "request 1 is due soon" in out
    assert verify_ledger(open_ledger(str(tmp_path / "service" / "ledger.db")), tmp_path / "service", []).broken is None


def test_a_pass_ends_in_order_when_its_scheduler_is_gone(monkeypatch):
    """The scheduler holds the other end of a pipe; the kernel closes it, however the scheduler ends."""
    reading, writing = os.pipe()
    asked: list[int] = []
    monkeypatch.setattr(rounds, "_STDIN", reading)
    monkeypatch.setattr(os, "kill", lambda process, number: asked.append(number))
    watching = threading.Thread(target=rounds._end_with_stdin)
    watching.start()
    os.write(writing, b"x")
    watching.join(0.2)
    assert watching.is_alive() and asked == []
    os.close(writing)
    watching.join(30)
    assert asked == [signal.SIGTERM]
    os.close(reading)
