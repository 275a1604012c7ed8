"""Malformed inputs, written rather than damaged: job and service files, ids, HTTP bodies, tokens."""

import contextlib
import copy
import hashlib
import io
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from chaos_arena import Arena
from fastapi.testclient import TestClient
from sqlalchemy import select

from distributed_unlearn.cli import main
from distributed_unlearn.config.service import RequestsConfig
from distributed_unlearn.service.http import MAX_BODY_BYTES, make_app
from distributed_unlearn.service.ledger import Ledger
from distributed_unlearn.service.tables import METADATA

DOCUMENTED = frozenset({2, *range(3, 10), *range(11, 15)})
VALUES: tuple[Any, ...] = (
    *(True, None, -1, 0, 10**30, 1e300, -1e300, float("nan"), "", " ", "word" * 40, [], {}, [[]], [None], {"a": "b"}),
    *("a\nb", "a\0b", "\u2028", "x" * 5000, "~nobody/x", "[", "*", "2021-13-45", "\x1b[31m", "{prompt}", "sklearn:x"),
)


@dataclass
class Outcomes:
    """How inputs ended, by kind: refused with one clear error; accepted, because the change left them valid."""

    refused: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    by_exit_code: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def note(self, kind: str, code: int) -> None:
        counts = self.refused if code else self.accepted
        counts[kind] = counts.get(kind, 0) + 1
        if code:
            self.by_exit_code[str(code)] = self.by_exit_code.get(str(code), 0) + 1

    def wrong(self, kind: str, case: str, text: str) -> None:
        self.violations.append(f"{kind}: {case}: {text}")
        print(f"violated: {self.violations[-1]}", file=sys.stderr, flush=True)


def call(arguments: Sequence[str]) -> tuple[int, str, str]:
    """A command in this process: exit code, output, errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as ended:  # of argparse
            code = ended.code if isinstance(ended.code, int) else 1
        except Exception as error:
            return 1, out.getvalue(), f"{err.getvalue()}Traceback {type(error).__name__}: {error}"
    return code, out.getvalue(), err.getvalue()


def one_clear_error(code: int, text: str) -> str | None:
    """What is wrong with how a command refused something; None: nothing."""
    if "Traceback" in text:
        return f"a traceback: {text[-700:]}"
    if code not in DOCUMENTED:
        return f"exit code {code}: {text[-300:]}"
    if code == 2:
        return None if text.count("error: ") == 1 else f"no usage error: {text[-300:]}"
    parts = [text.count(part) for part in ("error (", "\n  expected: ", "\n  to fix it: ")]
    return None if parts == [1, 1, 1] else f"not one error in three lines: {text[-500:]}"


def content(ledger: Ledger) -> str:
    """A hash of every row of every table but the lease."""
    digest = hashlib.sha256()
    with ledger.read() as connection:
        for table in METADATA.sorted_tables:
            if table.name != "leases":
                digest.update(repr(sorted(map(repr, connection.execute(select(table)).all()))).encode())
    return digest.hexdigest()


def attempt(outcomes: Outcomes, kind: str, case: str, arguments: Sequence[str]) -> int:
    """One command with one malformed input; returns its exit code."""
    code, _, err = call(arguments)
    if code and (complaint := one_clear_error(code, err)) is not None:
        outcomes.wrong(kind, case, complaint)
    outcomes.note(kind, code)
    return code


@contextlib.contextmanager
def nothing_lost(outcomes: Outcomes, kind: str, arena: Arena) -> Iterator[None]:
    """The ledger says after the block what it said before."""
    before = content(arena.ledger)
    yield
    if content(arena.ledger) != before:
        outcomes.wrong(kind, "all", "the ledger has changed")
    arena.check()


def _keys(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _keys(value, (*path, key))


def _spoil(tree: dict[str, Any], generator: random.Random) -> str:
    """Set, remove or add one key anywhere; says which."""
    path = generator.choice(list(_keys(tree)))
    section: Any = tree
    for key in path[:-1]:
        section = section[key]
    action = generator.choice(("set", "set", "remove", "add"))
    if action == "set":
        section[path[-1]] = generator.choice(VALUES)
    elif action == "remove":
        del section[path[-1]]
    else:
        section[generator.choice(("pathh", "max_step", "name", "x" * 300, "a\nb", ""))] = generator.choice(VALUES)
    return f"{action} {'.'.join(path)}"


_NO_YAML = (b"", b"[", b"a: [", b"\xff\xfe\x00", b"- 1", b"17", b"null", b"a: b: c", b"? [a]\n: b", b"[" * 2000)


def _files(
    outcomes: Outcomes, kind: str, path: Path, tree: dict[str, Any], command: Sequence[str], number: int, seed: int
) -> None:
    """Spoiled copies of a file of settings, until `number` were refused."""
    generator = random.Random(seed)
    for text in _NO_YAML:
        path.write_bytes(text)
        if attempt(outcomes, kind, repr(text[:20]), [*command, str(path)]) == 0:
            outcomes.wrong(kind, repr(text[:20]), "was accepted")
    for _ in range(4 * number):
        if outcomes.refused.get(kind, 0) >= number:
            return
        spoiled = copy.deepcopy(tree)
        case = _spoil(spoiled, generator)
        path.write_text(yaml.safe_dump(spoiled))
        attempt(outcomes, kind, case, [*command, str(path)])


def job_files(outcomes: Outcomes, arena: Arena, number: int, seed: int) -> None:
    tree = yaml.safe_load((arena.folder / "job.yaml").read_text())
    tree |= {"forget": {"subjects": [arena.people[0]]}, "output": str(arena.folder / "none")}
    with nothing_lost(outcomes, "job files", arena):
        _files(outcomes, "job files", arena.folder / "spoiled.yaml", tree, ["plan"], number, seed)
    if (arena.folder / "none").exists():
        outcomes.wrong("job files", "plan", "wrote its output")


def service_files(outcomes: Outcomes, arena: Arena, number: int, seed: int) -> None:
    tree = yaml.safe_load(arena.file.read_text())
    tree |= {"schedule": {"cron": "0 3 * * *", "timezone": "UTC"}, "requests": {"due_days": 30}}
    with nothing_lost(outcomes, "service files", arena):
        _files(outcomes, "service files", arena.folder / "spoiled.yaml", tree, ["status"], number, seed)


def ids(outcomes: Outcomes, arena: Arena) -> None:
    """What no request can name, in every way that a request comes in on the shell."""
    scratch = arena.folder / "ids.txt"
    bad = (
        "",
        " ",
        "a ",
        " a",
        "a\n",
        "a\tb",
        "a\0",
        "\x1b[0m",
        "x" * 501,
        "\u2028",
        "\u200b",
        "\ud800",
        "\x7f",
        "\u202e",
    )
    add = ["request", "add", "--service", str(arena.file)]
    cases: list[list[str]] = [[*add, option, text] for option in ("--subject", "--record-id") for text in bad]
    cases += [[*add, "--subject", "a", "--external-id", text] for text in (*bad[:6], "x" * 201)]
    cases += [
        [*add, "--subject", "a", "--due", text] for text in ("", "tomorrow", "2021-13-45", "1999-01-01", "9" * 40)
    ]
    cases += [[*add], [*add, "--policy", "mars", "--subject", "a"], [*add, "--file", str(arena.folder / "absent")]]
    cases += [
        ["request", word, "--service", str(arena.file), number] for word in ("show", "revoke") for number in ("0", "-1")
    ]
    cases += [["request", "show", "--service", str(arena.file), number] for number in ("9999", "x", "1e9", str(10**30))]
    cases += [["request", "list", "--service", str(arena.file), "--state", "lost"]]
    cases += [["request", "cancel", "--service", str(arena.file), "1", "--reason", "mistaken"]]  # it is erased
    with nothing_lost(outcomes, "ids", arena):
        for arguments in cases:
            if attempt(outcomes, "ids", repr(arguments[4:]), arguments) == 0:
                outcomes.wrong("ids", repr(arguments[4:]), "was accepted")
        for text in (b"", b"\n\n", b"\xff\xfe", b"a\0b\n", b"x" * 600, b"\n".join(b"%d" % n for n in range(100_001))):
            scratch.write_bytes(text)
            if attempt(outcomes, "ids", f"a file of {text[:10]!r}", [*add, "--file", str(scratch)]) == 0:
                outcomes.wrong("ids", f"a file of {text[:10]!r}", "was accepted")


TOKEN = "t" * 32
_SECRET = "person-secret"
_BODIES: tuple[bytes, ...] = (
    *(b"", b"{", b"[]", b"null", b"17", b'"a"', b"\xff", b"[" * 5000, b'{"subjects": "person-secret"}', b"{}"),
    *(b'{"subjects": [1]}', b'{"subjects": [null]}', b'{"subjects": [[]]}', b'{"subjects": {}}', b'{"subjects": [""]}'),
    *(b'{"subjects": [" person-secret"]}', b'{"subjects": ["person-secret\\n"]}', b'{"subjects": ["\\u0000"]}'),
    *(b'{"subjects": ["\\ud800"]}', b'{"subjects": ["a"], "text": "person-secret"}', b'{"record_ids": 5}'),
    *(b'{"subjects": ["a"], "due": "tomorrow"}', b'{"subjects": ["a"], "due": "1999-01-01T00:00:00Z"}'),
    *(b'{"subjects": ["a"], "due": "2099-01-01T00:00:00"}', b'{"subjects": ["a"], "due": 1e400}'),
    *(b'{"subjects": ["a"], "policy": "mars"}', b'{"subjects": ["a"], "policy": null}', b'{"subjects": ["a"]} x'),
    *(b'{"subjects": ["a"], "external_id": ""}', b'{"subjects": ["a"], "external_id": 7}', b'{"subjects": ["a"],}'),
    *(b'{"subjects": ["a"], "external_id": "%s"}' % (b"x" * 201), b'{"subjects": ["%s"]}' % (b"x" * 501)),
    *(b'{"subjects": ["a"], "subjects": []}', b"x" * (MAX_BODY_BYTES + 1), b"<a/>", b"subjects=a", b"\x1f\x8b\x08"),
    json.dumps({"subjects": [str(n) for n in range(100_001)]}).encode(),
)
_TOKENS: tuple[bytes | None, ...] = (
    *(None, b"", b"Bearer", b"Bearer ", f"Bearer {TOKEN}x".encode(), f"Bearer {TOKEN[:-1]}".encode(), TOKEN.encode()),
    *(
        f"Basic {TOKEN}".encode(),
        f"bearer {TOKEN}".encode(),
        f"Bearer  {TOKEN}".encode(),
        b"Bearer \xff",
        b"Bearer null",
    ),
)


def http(outcomes: Outcomes, arena: Arena) -> None:
    """Bodies, paths and tokens; an answer is one JSON object of four sentences, without what was sent."""
    app = make_app(arena.ledger, RequestsConfig(), TOKEN, webhook=False)
    client = TestClient(app, raise_server_exceptions=False)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}

    def ask(kind: str, case: str, send: Callable[[], Any], statuses: range = range(400, 500)) -> None:
        answer = send()
        try:
            tree = answer.json()
        except ValueError:
            tree = {}
        if answer.status_code not in statuses or tree.keys() != {"error", "got", "expected", "remedy"}:
            outcomes.wrong(kind, case, f"{answer.status_code}: {answer.text[:200]}")
        if _SECRET in answer.text:
            outcomes.wrong(kind, case, "what was sent came back")
        outcomes.note(kind, answer.status_code)

    with nothing_lost(outcomes, "HTTP bodies", arena):
        for body in _BODIES:
            ask("HTTP bodies", repr(body[:50]), lambda b=body: client.post("/requests", content=b, headers=headers))
        for path in ("/requests/0", "/requests/9999", "/requests/-1", "/requests/x", f"/requests/{10**40}", "/none"):
            ask("HTTP paths", path, lambda p=path: client.get(p, headers=headers))
        ask("HTTP paths", "revoke an erased one", lambda: client.post("/requests/1/revoke", headers=headers))
        ask("HTTP paths", "no external id", lambda: client.get("/requests", headers=headers))
        ask("HTTP paths", "DELETE", lambda: client.delete("/requests/1", headers=headers))
        for token in _TOKENS:
            given = {} if token is None else {"Authorization": token}
            send = lambda g=given: client.post("/requests", content=b'{"subjects": ["a"]}', headers=g)  # noqa: E731
            ask("tokens", repr(token), send, range(401, 402))
    _token_files(outcomes, arena)


def _token_files(outcomes: Outcomes, arena: Arena) -> None:
    """Files of tokens that the endpoint must refuse to start with."""
    token = arena.folder / "token"
    tree = yaml.safe_load(arena.file.read_text()) | {"http": {"token_file": str(token), "port": 0}}
    path = arena.folder / "http.yaml"
    path.write_text(yaml.safe_dump(tree))
    for text, mode in (
        (b"short", 0o600),
        (b"", 0o600),
        (b"\xff" * 40, 0o600),
        (b"a b " * 10, 0o600),
        (b"t" * 40, 0o644),
    ):
        token.write_bytes(text)
        token.chmod(mode)
        attempt(outcomes, "tokens", f"a file {text[:8]!r} {mode:o}", ["request", "serve", str(path)])
    token.unlink()
    attempt(outcomes, "tokens", "no file", ["request", "serve", str(path)])
