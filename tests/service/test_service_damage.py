"""A state that was damaged on disk after its commit: no round goes on from it, and no request is lost."""

import pytest

from distributed_unlearn.config.service import load_service
from distributed_unlearn.errors import LedgerError
from distributed_unlearn.service.ledger import Ledger, open_ledger
from distributed_unlearn.service.requests import NewRequest, add_request, get_request
from distributed_unlearn.service.states import RequestState
from tests.service.fake_round import FakeRounds, make_service, one_pass


@pytest.fixture
def path(tmp_path):
    return make_service(tmp_path)


def _open(path) -> Ledger:
    config = load_service(path, [])
    config.root.mkdir(exist_ok=True)
    return open_ledger(config.ledger_url, create=True)


def _ask(path, record: str) -> int:
    return add_request(_open(path), NewRequest(record_ids=(record,)), load_service(path, []).requests).number


def test_no_round_goes_on_from_a_state_that_is_not_as_it_was_committed(path, tmp_path):
    _ask(path, "r0")
    one_pass(path, FakeRounds())
    weights = tmp_path / "service" / "states" / "round-0001" / "checkpoint" / "model.safetensors"
    whole, second, rounds = weights.read_bytes(), _ask(path, "r1"), FakeRounds()
    weights.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(LedgerError, match=r"round 1: 'states/round-0001/checkpoint/model.safetensors' was changed"):
        one_pass(path, rounds)
    assert rounds.jobs == [] and get_request(_open(path), second).state == RequestState.SCHEDULED
    weights.write_bytes(whole)
    assert one_pass(path, rounds).round.number == 2
