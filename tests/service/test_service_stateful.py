"""Random histories of the ledger beside a model of it in plain dictionaries: they must agree after every step."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from distributed_unlearn.config.service import RequestsConfig, RetentionConfig
from distributed_unlearn.errors import LeaseError, RequestError
from distributed_unlearn.service import lease as leases
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.requests import NewRequest, add_request, list_requests, withdraw
from distributed_unlearn.service.retention import purge
from distributed_unlearn.service.rounds_book import (
    StateFiles,
    commit_round,
    current_round,
    deny,
    erased_in_rounds,
    open_round,
    roll_back,
    schedule_ripe,
    start_round,
)
from distributed_unlearn.service.states import FINAL_STATES, Reason, RequestState
from distributed_unlearn.service.verification import verify_ledger
from tests.service.conftest import Clock

R = RequestState
IDS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3, unique=True)
WITHDRAWALS = {R.CANCELLED: Reason.MISTAKEN, R.REVOKED: Reason.WITHDRAWN}


class LedgerMachine(RuleBasedStateMachine):
    """The model: states and ids by request, the open and the current round, the last token of the lease."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.ledger = open_ledger(str(self.folder / "ledger.db"), create=True, clock=self.clock)
        self.states, self.ids, self.ripe_at, self.external, self.ended = {}, {}, {}, {}, {}
        self.num_rounds, self.open, self.current, self.erased, self.purged = 0, None, None, {}, set()
        self.leases = []

    def teardown(self):
        shutil.rmtree(self.folder)

    @initialize()
    def first_scheduler(self):
        self.leases.append(leases.acquire(self.ledger, "m0/1/x", 10))

    def _move(self, number, state):
        self.states[number] = state
        if state in FINAL_STATES:
            self.ended[number] = self.clock.now

    @rule(ids=IDS, external=st.sampled_from([None, "x", "y"]), delay=st.sampled_from([0, 5]))
    def add(self, ids, external, delay):
        new, policy = NewRequest(record_ids=tuple(ids), external_id=external), RequestsConfig(delay_hours=delay)
        if external in self.external:
            number = self.external[external]
            if set(ids) == self.ids[number]:
                assert add_request(self.ledger, new, policy).number == number
            else:
                with pytest.raises(RequestError):
                    add_request(self.ledger, new, policy)
            return
        live = [n for n, state in self.states.items() if state not in FINAL_STATES or state == R.ERASED]
        found = add_request(self.ledger, new, policy)
        assert found.number == len(self.states) + 1
        assert found.duplicate_of == next((n for n in sorted(live) if set(ids) <= self.ids[n]), None)
        self.states[found.number], self.ids[found.number] = R.RECEIVED, set(ids)
        self.ripe_at[found.number] = found.not_before
        if external is not None:
            self.external[external] = found.number

    @rule(hours=st.sampled_from([1, 5, 24 * 20, -3]))
    def time_passes(self, hours):
        self.clock.advance(hours=hours)

    @precondition(lambda self: self.states)
    @rule(data=st.data(), end=st.sampled_from(sorted(WITHDRAWALS)))
    def withdraw(self, data, end):
        number = data.draw(st.sampled_from(sorted(self.states)))
        if self.states[number] in (R.RECEIVED, R.SCHEDULED):
            withdraw(self.ledger, number, WITHDRAWALS[end], end)
            self._move(number, end)
        else:
            with pytest.raises(RequestError):
                withdraw(self.ledger, number, WITHDRAWALS[end], end)

    @rule()
    def another_scheduler_takes_over(self):
        self.clock.advance(seconds=11)
        self.leases.append(leases.acquire(self.ledger, f"m{len(self.leases)}/1/x", 10))
        if self.open is not None:
            self._roll_back(Reason.INTERRUPTED)

    def _lease(self, data):
        """Mostly the last lease; an older one must be refused, and then changes nothing."""
        stale = len(self.leases) > 1 and data.draw(st.integers(0, 4)) == 0
        return self.leases[-2 if stale else -1], stale

    @rule(data=st.data())
    def schedule(self, data):
        lease, stale = self._lease(data)
        if stale:
            with pytest.raises(LeaseError):
                schedule_ripe(self.ledger, lease)
            return
        ripe = [n for n, s in self.states.items() if s == R.RECEIVED and self.ripe_at[n] <= self.clock.now]
        assert schedule_ripe(self.ledger, lease) == sorted(ripe)
        self.states.update(dict.fromkeys(ripe, R.SCHEDULED))

    def _scheduled(self):
        return sorted(n for n, state in self.states.items() if state == R.SCHEDULED)

    @precondition(lambda self: self._scheduled())
    @rule(data=st.data())
    def deny(self, data):
        number = data.draw(st.sampled_from(self._scheduled()))
        deny(self.ledger, self.leases[-1], {number: Reason.UNKNOWN_ID}, {})
        self._move(number, R.DENIED)

    @precondition(lambda self: self._scheduled() and self.open is None)
    @rule(data=st.data())
    def start(self, data):
        chosen = data.draw(st.lists(st.sampled_from(self._scheduled()), min_size=1, unique=True))
        lease, stale = self._lease(data)
        if stale:
            with pytest.raises(LeaseError):
                start_round(self.ledger, lease, chosen)
            return
        self.num_rounds += 1
        self.open = (start_round(self.ledger, lease, chosen).number, chosen)
        assert self.open[0] == self.num_rounds
        self.states.update(dict.fromkeys(chosen, R.IN_ROUND))

    @precondition(lambda self: self.open is not None)
    @rule(data=st.data())
    def commit(self, data):
        number, chosen = self.open
        lease, stale = self._lease(data)
        erased = {request: sorted(self.ids[request]) for request in chosen}
        state = StateFiles(f"states/round-{number:04d}", "0" * 64, {})
        if stale:
            with pytest.raises(LeaseError):
                commit_round(self.ledger, lease, number, state, erased)
            return
        commit_round(self.ledger, lease, number, state, erased)
        for request in chosen:
            self._move(request, R.ERASED)
            for record in self.ids[request]:
                self.erased.setdefault(record, number)
        self.open, self.current = None, number

    def _roll_back(self, reason):
        number, chosen = self.open
        roll_back(self.ledger, self.leases[-1], number, reason, "no")
        self.states.update(dict.fromkeys(chosen, R.SCHEDULED))
        self.open = None

    @precondition(lambda self: self.open is not None)
    @rule()
    def roll_back(self):
        self._roll_back(Reason.GATE_FAILED)

    @rule()
    def purge(self):
        days = 30
        found = purge(self.ledger, self.leases[-1], RetentionConfig(ids_days=days), self.folder).requests
        old = {n for n, at in self.ended.items() if (self.clock.now - at).days >= days and n not in self.purged}
        assert set(found) == old
        self.purged |= old

    @invariant()
    def the_ledger_agrees(self):
        found = list_requests(self.ledger)
        assert {r.number: r.state for r in found} == self.states
        for request in found:
            assert set(request.record_ids) == (set() if request.number in self.purged else self.ids[request.number])
        number = current_round(self.ledger)
        assert (number and number.number) == self.current
        running = open_round(self.ledger)
        assert (running and running.number) == (self.open and self.open[0])
        with self.ledger.write() as writing:
            erased = {writing.hash_name("record", record): number for record, number in self.erased.items()}
        assert erased_in_rounds(self.ledger) == erased
        assert verify_ledger(self.ledger, None, []).broken is None


def test_the_ledger_agrees_with_a_model_of_it():
    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
