"""Certificates: signed statements that say what happened, verify offline, and break when a byte of them changes."""

import base64
import copy
import json
import shutil

import pytest
import yaml
from securesystemslib.signer import CryptoSigner

from distributed_unlearn.config import AdapterFolder
from distributed_unlearn.config.service import RequestsConfig, load_service
from distributed_unlearn.errors import CheckFailedError, ConfigError, DataError
from distributed_unlearn.provenance import hash_ids
from distributed_unlearn.service.certificate import (
    APPROXIMATE,
    Answer,
    make_statement,
    sign_statement,
    verify_certificate,
)
from distributed_unlearn.service.certificate_page import certificate_page
from distributed_unlearn.service.heads import read_head
from distributed_unlearn.service.keys import generate_key, load_public_key, load_signer
from distributed_unlearn.service.lease import acquire
from distributed_unlearn.service.opening import opened
from distributed_unlearn.service.requests import NewRequest, add_request, get_request, withdraw
from distributed_unlearn.service.rounds_book import StateFiles, commit_round, schedule_ripe, start_round
from distributed_unlearn.service.states import Reason, RequestState
from tests.cli.command_line import assert_refused, call, succeed
from tests.service.fake_round import FakeRounds, ask, make_service, one_pass

SET = {"num_records": 3, "loss_nats_per_token": 2.5, "exact_memorisation": 0.5, "extraction_strength": None}
RECORD = {
    "config": {"objective": {"name": "holdout_matched"}, "solver": {"method": "scurenewton", "max_steps": 2}},
    "versions": {"torch": "2"},
    "base": {"files": {"model.safetensors": "b" * 64}},
    "result": {"files": {"model.safetensors": "a" * 64, "config.json": "c" * 64}},
    "surviving_update": {"projection": 1.0},
    "rounds": [
        {
            "num_forget_records": 3,
            "num_retain_records": 9,
            "num_steps": 3,
            "num_products": 4,
            "update_norm": 0.25,
            "stop_reason": "max_steps: <b>all</b> 3 steps were taken",
            "steps": [
                {"accepted": True, "alpha": 0.5, "gamma": 25.0},
                {"accepted": False, "alpha": 9.0, "gamma": 9.0},
                {"accepted": True, "alpha": 0.125, "gamma": None},
            ],
            "before": {"forget": {**SET, "loss_nats_per_token": 0.1}},
            "after": {"forget": SET},
        }
    ],
}


@pytest.fixture
def answer(ledger):
    add_request(ledger, NewRequest(subjects=("anna",), record_ids=("r1",)), RequestsConfig())
    lease = acquire(ledger, "node/0/test", 60)
    schedule_ripe(ledger, lease)
    start_round(ledger, lease, [1])
    entry = commit_round(ledger, lease, 1, StateFiles("states/round-0001", "0" * 64, {}), {1: ["r1", "r2", "r3"]})
    return Answer(get_request(ledger, 1), read_head(ledger), entry, RECORD, 3)


def test_a_statement_says_what_happened_and_names_nobody(answer):
    statement = make_statement(answer)
    found = statement["predicate"]
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [
        {"name": "config.json", "digest": {"sha256": "c" * 64}},
        {"name": "model.safetensors", "digest": {"sha256": "a" * 64}},
    ]
    assert found["answer"]["outcome"] == "deleted" and found["approximate"] == APPROXIMATE
    assert found["round"]["alpha"] == {"first": 0.5, "last": 0.125, "largest": 0.5}, "of accepted steps alone"
    assert found["round"]["gamma"] == {"first": 25.0, "last": 25.0, "largest": 25.0}
    assert found["round"]["scores"]["after"]["forget"]["extraction_strength"] is None
    assert (found["ledger"]["entry"], found["ledger"]["sha256"]) == (answer.head.seq, answer.head.hash)
    text = json.dumps(statement)
    assert "anna" not in text and "r1" not in text
    salt = found["request"]["salt"]
    assert found["request"]["ids_sha256_salted"] == hash_ids(["subject\0anna", "record\0r1"], salt)
    assert make_statement(answer)["predicate"]["request"]["salt"] != salt


def test_requests_without_a_round_are_certified_by_the_ledgers_entry(ledger):
    add_request(ledger, NewRequest(subjects=("anna",)), RequestsConfig())
    withdrawn = withdraw(ledger, 1, Reason.EXEMPT, RequestState.CANCELLED)
    statement = make_statement(Answer(withdrawn, read_head(ledger), None, None, 0))
    assert statement["subject"][0]["digest"] == {"sha256": read_head(ledger).hash}
    assert statement["predicate"]["round"] is None and statement["predicate"]["approximate"] is None
    assert statement["predicate"]["answer"]["outcome"] == "exempted"
    assert "exempt" in certificate_page(statement, "0" * 64)


def test_the_page_shows_everything_and_escapes_it(answer):
    page = certificate_page(make_statement(answer), "e" * 64)
    for text in (APPROXIMATE, "were erased", "scurenewton", "0.25", "forget: loss nats per token", "a" * 64, "e" * 64):
        assert text in page
    assert "<b>all</b>" not in page and "&lt;b&gt;all" in page and "not measured" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


@pytest.fixture
def signed(answer, tmp_path):
    public = generate_key(tmp_path / "operator.key")
    path = tmp_path / "certificate.json"
    path.write_text(sign_statement(make_statement(answer), load_signer(tmp_path / "operator.key")))
    return path, public


def test_a_certificate_verifies_offline_and_any_of_several_keys_may_sign(capsys, signed, tmp_path):
    path, public = signed
    other = generate_key(tmp_path / "other.key")
    assert "unchanged" in succeed(capsys, ["verify", "--certificate", str(path), "--key", str(public)]).out
    arguments = ["verify", "--certificate", str(path), "--key", str(other), "--key", str(public), "--json"]
    assert json.loads(succeed(capsys, arguments).out)["predicate"]["request"]["number"] == 1
    refused = call(capsys, ["verify", "--certificate", str(path), "--key", str(other)])
    assert_refused(refused, 9, "check", "none of the 1 key(s)")
    assert_refused(call(capsys, ["verify", "--certificate", str(path)]), 3, "configuration", "--key")


def test_every_change_of_a_certificate_is_found(signed):
    path, public = signed
    key, whole = load_public_key(public), path.read_bytes()
    envelope = json.loads(whole)
    payload = base64.b64decode(envelope["payload"])
    for position in range(0, len(payload), max(1, len(payload) // 60)):
        changed = copy.deepcopy(envelope)
        spoilt = payload[:position] + bytes([payload[position] ^ 1]) + payload[position + 1 :]
        changed["payload"] = base64.b64encode(spoilt).decode()
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckFailedError):
            verify_certificate(path, [key])
    for length in range(0, len(whole) - 2, max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with pytest.raises((DataError, CheckFailedError)):
            verify_certificate(path, [key])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"payload": 1, "payloadType": 2, "signatures": 3}',
        b'{"payload": "", "payloadType": "", "signatures": []}',
        b'{"payload": "!!", "payloadType": "x", "signatures": [{"keyid": "a", "sig": "!!"}]}',
        b"[" * 100_000,
    ],
)
def test_files_that_are_no_certificate_are_refused(content, signed):
    path, public = signed
    path.write_bytes(content)
    with pytest.raises((DataError, CheckFailedError)):
        verify_certificate(path, [load_public_key(public)])


def test_another_statement_signed_by_the_operator_is_no_certificate(signed, tmp_path):
    path, public = signed
    signer = load_signer(tmp_path / "operator.key")
    for statement in ({}, {"_type": "https://in-toto.io/Statement/v1", "predicateType": "other", "predicate": {}}):
        path.write_text(sign_statement(statement, signer))
        with pytest.raises(DataError, match="no certificate"):
            verify_certificate(path, [load_public_key(public)])


def test_key_files_that_are_none_are_refused(tmp_path):
    rsa = CryptoSigner.generate_rsa(size=2048)
    for name, content in (("empty", b""), ("text", b"hello"), ("rsa", rsa.private_bytes)):
        path = tmp_path / name
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="Ed25519"):
            load_signer(path)
        with pytest.raises(ConfigError, match="Ed25519"):
            load_public_key(path)
    generate_key(tmp_path / "operator.key")
    (tmp_path / "operator.key").chmod(0o640)
    with pytest.raises(ConfigError, match="others can read"):
        load_signer(tmp_path / "operator.key")


def _round_for(path, rounds, *record_ids):
    with opened(load_service(path, [])) as service:
        number = ask(service, record_ids=record_ids)
    return number, one_pass(path, rounds)


def test_a_request_is_answered_although_an_older_state_is_gone(tmp_path):
    """As after a restore from a backup of the current state alone."""
    path = make_service(tmp_path)
    for name in ("r0", "r1"):
        _round_for(path, FakeRounds(), name)
    shutil.rmtree(tmp_path / "service" / "states" / "round-0001")
    again, found = _round_for(path, FakeRounds(), "r0")
    assert found.certificates == (again,)


def test_a_round_of_an_adapter_goes_on_from_the_adapter_on_its_base(tmp_path):
    path, rounds = make_service(tmp_path), FakeRounds()
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    job["model"]["adapter"] = {"name": "lora"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    for name in ("r0", "r1"):
        _round_for(path, rounds, name)
    first, second = (found.model for found in rounds.jobs)
    assert first.path == second.path and isinstance(second.adapter, AdapterFolder)
    assert second.adapter.path == str(tmp_path / "service" / "states" / "round-0001" / "checkpoint")
