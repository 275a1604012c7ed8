"""The HTTP endpoint: nothing without the token, the same requests as on the shell, and no ids in what comes back."""

import hmac
import http.server
import json
import threading

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from distributed_unlearn.config.service import HttpConfig, RequestsConfig, ServiceConfig, WebhookConfig
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.service.http import MAX_BODY_BYTES, make_app, serve
from distributed_unlearn.service.lease import acquire
from distributed_unlearn.service.requests import NewRequest, add_request, list_requests, withdraw
from distributed_unlearn.service.secrets_file import read_secret
from distributed_unlearn.service.states import Reason, RequestState
from distributed_unlearn.service.tables import WEBHOOKS
from distributed_unlearn.service.webhook import deliver

TOKEN = "t" * 32


@pytest.fixture
def client(ledger):
    app = make_app(ledger, RequestsConfig(), TOKEN, webhook=False)
    return TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}, raise_server_exceptions=False)


def test_a_request_is_taken_in_once_polled_and_revoked(client, ledger):
    body = {"subjects": ["anna"], "external_id": "case-1", "policy": "california"}
    first = client.post("/requests", json=body)
    assert (first.status_code, first.json()["status"], first.json()["num_ids"]) == (201, "open", 1)
    assert "anna" not in first.text
    assert client.post("/requests", json=body).status_code == 200 and len(list_requests(ledger)) == 1
    assert client.get("/requests/1").json() == client.get("/requests", params={"external_id": "case-1"}).json()
    assert client.post("/requests/1/revoke").json()["status"] == "denied"
    assert client.post("/requests/1/revoke").status_code == 409
    assert client.post("/requests", json={**body, "subjects": ["bert"]}).status_code == 409


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", f"bearer {TOKEN}", "Bearer é"]
)
def test_nothing_without_the_token(ledger, header):
    client = TestClient(make_app(ledger, RequestsConfig(), TOKEN, webhook=False))
    headers = {} if header is None else {"Authorization": header.encode()}
    for method, path in (("GET", "/requests/1"), ("POST", "/requests"), ("POST", "/requests/1/revoke"), ("GET", "/x")):
        answer = client.request(method, path, headers=headers, content=b"{}" if method == "POST" else None)
        assert (answer.status_code, answer.json()["error"]) == (401, "token")
    assert client.get("/openapi.json").status_code == 200 == client.get("/docs").status_code


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b"null", 422),
        (b'{"subjects": "anna-secret"}', 422),
        (b'{"subjects": [1]}', 422),
        (b'{"subjects": []}', 422),
        (b'{"subjects": [" anna-secret"]}', 422),
        (b'{"subjects": ["anna-secret"], "text": "what is to be forgotten"}', 422),
        (b'{"subjects": ["anna-secret"], "due": "tomorrow"}', 422),
        (b'{"subjects": ["anna-secret"], "due": "2099-01-01T00:00:00"}', 422),
        (b'{"subjects": ["anna-secret"], "due": "1999-01-01T00:00:00Z"}', 422),
        (b'{"subjects": ["anna-secret"], "policy": "mars"}', 422),
        (b'{"subjects": ["\xff"]}', 400),
        (b'{"subjects": ["\\u0000"]}', 422),
        (b'{"subjects": ["\\ud800"]}', 422),
        (b'{"subjects": ["a"], "external_id": ""}', 422),
        (b"x" * (MAX_BODY_BYTES + 1), 413),
    ],
)
def test_malformed_bodies_are_refused_and_not_repeated(client, ledger, body, status):
    answer = client.post("/requests", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and {"error", "got", "expected", "remedy"} == answer.json().keys()
    assert "anna-secret" not in answer.text and "forgotten" not in answer.text
    assert list_requests(ledger) == []


@pytest.mark.parametrize(("path", "status"), [("/requests/0", 404), ("/requests/9", 404), ("/requests/1e9", 422)])
def test_unknown_requests(client, path, status):
    assert client.get(path).status_code == status
    assert client.get("/requests", params={"external_id": "none"}).status_code == 404


def test_an_impossible_due_date_and_an_unknown_key_are_refused_without_what_was_sent(client, ledger):
    late = {"subjects": ["anna"], "due": "9999-12-31T23:59:59-12:00"}
    assert client.post("/requests", json=late).status_code == 422
    answer = client.post("/requests", json={"subjects": ["anna"], "bert@example.org": 1})
    assert answer.status_code == 422 and "bert" not in answer.text and list_requests(ledger) == []


def test_a_body_of_unknown_length_is_refused(client):
    assert client.post("/requests", content=iter([b"{}"])).status_code == 413


def test_a_ledger_that_is_gone_is_not_shown_to_the_caller(client, tmp_path):
    for path in tmp_path.glob("ledger.db*"):
        path.unlink()
    (tmp_path / "ledger.db").mkdir()
    answer = client.get("/requests/1")
    assert answer.status_code == 503 and str(tmp_path) not in answer.text


def test_the_endpoint_needs_a_secret_token_and_its_section(tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o644)
    for http_config in (None, HttpConfig(token_file=str(token)), HttpConfig(token_file=str(tmp_path / "none"))):
        with pytest.raises(ConfigError):
            serve(ServiceConfig(folder=str(tmp_path), job="j", key="k", http=http_config))
    token.chmod(0o600)
    assert read_secret(str(token), "x") == TOKEN
    token.write_text("short")
    with pytest.raises(ConfigError, match="unfit") as refused:
        read_secret(str(token), "x")
    assert "'short'" not in str(refused.value)
    assert HttpConfig(token_file="t").host == "127.0.0.1"


class _Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((dict(self.headers), body))
        status = self.server.answers.pop(0)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self):
        self.server.seen.append(("a redirection was followed", b""))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def receiver():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Receiver)
    server.seen, server.answers = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def _webhook(receiver, attempts=3):
    url = f"http://127.0.0.1:{receiver.server_address[1]}/hook"
    return WebhookConfig(url=url, secret_file="-", attempts=attempts, first_pause_seconds=10, timeout_seconds=5)


def test_an_outcome_is_sent_signed_until_it_arrives(ledger, clock, receiver):
    lease, config = acquire(ledger, "node/0/test", 60), _webhook(receiver)
    add_request(ledger, NewRequest(subjects=("anna",), external_id="case-1"), RequestsConfig(), webhook=True)
    add_request(ledger, NewRequest(subjects=("bert",)), RequestsConfig(), webhook=False)
    receiver.answers = [500, 302, 204]
    assert deliver(ledger, lease, config, "s").delivered == 0 and receiver.seen == [], "there is no outcome yet"
    for number in (1, 2):
        withdraw(ledger, number, Reason.WITHDRAWN, RequestState.REVOKED)
    assert deliver(ledger, lease, config, "s").failed == 1
    assert deliver(ledger, lease, config, "s").failed == 0, "its pause is not over"
    clock.advance(seconds=10)
    assert deliver(ledger, lease, config, "s").failed == 1
    clock.advance(seconds=10)
    assert deliver(ledger, lease, config, "s").delivered == 0, "the second pause is twice as long"
    clock.advance(seconds=10)
    assert deliver(ledger, lease, config, "s").delivered == 1
    assert deliver(ledger, lease, config, "s").delivered == 0 and len(receiver.seen) == 3
    headers, body = receiver.seen[-1]
    message = json.loads(body)
    assert (message["external_id"], message["status"], message["reason"]) == ("case-1", "denied", "withdrawn")
    signed = hmac.new(b"s", headers["X-Timestamp"].encode() + b"." + body, "sha256").hexdigest()
    assert headers["X-Signature"] == f"sha256={signed}" and "anna" not in body.decode()
    assert len({seen[0]["X-Delivery"] for seen in receiver.seen}) == 1


def test_tries_are_bounded(ledger, clock, receiver):
    lease, config = acquire(ledger, "node/0/test", 10**6), _webhook(receiver, attempts=2)
    add_request(ledger, NewRequest(subjects=("anna",)), RequestsConfig(), webhook=True)
    withdraw(ledger, 1, Reason.WITHDRAWN, RequestState.REVOKED)
    receiver.answers = [500, 500, 200]
    assert deliver(ledger, lease, config, "s").failed == 1
    clock.advance(hours=1)
    assert deliver(ledger, lease, config, "s").given_up == 1
    clock.advance(days=1)
    deliver(ledger, lease, config, "s")
    assert len(receiver.seen) == 2
    with ledger.read() as connection:
        row = connection.execute(select(WEBHOOKS)).one()
    assert (row.attempts, row.next_at, row.delivered) == (2, None, False)
