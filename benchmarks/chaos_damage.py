"""Malformed inputs, damaged rather than written: ledgers, certificates, keys, checkpoints cut short or bit-flipped."""

import base64
import contextlib
import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from chaos_arena import Arena
from chaos_inputs import Outcomes, attempt, call

from distributed_unlearn.service.keys import generate_key


@contextlib.contextmanager
def _copied(arena: Arena) -> Iterator[Path]:
    """A copy of the service's folder that may be spoiled."""
    copy = arena.folder / "copy"
    shutil.copytree(arena.root, copy, symlinks=True)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


def _verify(outcomes: Outcomes, kind: str, case: str, arena: Arena, copy: Path) -> None:
    key = str(arena.folder / "operator.pub")
    if attempt(outcomes, kind, case, ["verify", "--ledger", str(copy / "ledger.db"), "--key", key]) == 0:
        outcomes.wrong(kind, case, "verified")


_FORGERIES = (
    "UPDATE audit SET body = body || ' ' WHERE seq = (SELECT max(seq) FROM audit)",
    "UPDATE audit SET event = 'request_moved' WHERE seq = 1",
    "UPDATE audit SET at = '2020-01-01T00:00:00.000000Z' WHERE seq = 2",
    "UPDATE audit SET previous = hash WHERE seq = 3",
    "UPDATE audit SET hash = previous WHERE seq = 3",
    "DELETE FROM audit WHERE seq = 4",
    "DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)",
    "DELETE FROM audit",
    "UPDATE audit SET seq = seq + 1000",
    "UPDATE requests SET state = 'denied' WHERE id = 1",
    "UPDATE requests SET round_id = NULL WHERE id = 1",
    "UPDATE requests SET due_at = '2020-01-01T00:00:00.000000Z' WHERE id = 2",
    "UPDATE requests SET external_id = 'other' WHERE id = 1",
    "UPDATE requests SET external_id_hash = NULL WHERE id = 1",
    "DELETE FROM requests WHERE id = 2",
    "UPDATE request_names SET name = 'other' WHERE request_id = 1",
    "UPDATE request_names SET name_hash = 'aa' WHERE request_id = 1",
    "DELETE FROM request_names WHERE request_id = 1",
    "UPDATE erased_records SET record_id = 'other'",
    "UPDATE erased_records SET record_hash = record_hash || 'a'",
    "DELETE FROM erased_records",
    "UPDATE rounds SET state = 'rolled_back' WHERE id = 1",
    "UPDATE rounds SET folder = 'states/round-0099' WHERE id = 1",
    "UPDATE rounds SET files_sha256 = '{}' WHERE id = 1",
    "UPDATE rounds SET record_sha256 = NULL WHERE id = 1",
    "DELETE FROM rounds WHERE id = 1",
    "UPDATE head_signatures SET signature = replace(signature, '0', '1')",
    "UPDATE head_signatures SET signature = 'x'",
    "DELETE FROM certificates",
    "UPDATE certificates SET sha256 = 'x'",
    "UPDATE certificates SET path = '../operator.key'",
    "UPDATE ledger SET current_round = NULL",
    "UPDATE ledger SET salt = 'x'",
    "UPDATE ledger SET head_hash = 'x'",
    "UPDATE ledger SET ledger_id = 'x'",
    "DELETE FROM ledger",
    "UPDATE alembic_version SET version_num = '9999'",
    "DROP TABLE audit",
    "DROP TABLE alembic_version",
)


def _forge(path: Path, statement: str) -> None:
    """What somebody with the file can do: the triggers dropped first."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(statement)
        connection.commit()


def ledgers(outcomes: Outcomes, arena: Arena, seed: int) -> None:
    """Rows changed by hand, files cut short, bits flipped in what the trail says."""
    generator = random.Random(seed)
    for statement in _FORGERIES:
        with _copied(arena) as copy:
            _forge(copy / "ledger.db", statement)
            _verify(outcomes, "ledgers", statement, arena, copy)
    with _copied(arena) as copy:
        with contextlib.closing(sqlite3.connect(copy / "ledger.db")) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        whole = (copy / "ledger.db").read_bytes()
        for side in copy.glob("ledger.db-*"):
            side.unlink()
        for length in (0, 1, 50, 100, 512, 4096, 5000, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
            (copy / "ledger.db").write_bytes(whole[:length])
            _verify(outcomes, "ledgers", f"cut to {length}", arena, copy)
        for _ in range(20):
            spots = [at for at in _spots(whole, b'"request":') if at + 40 < len(whole)]
            at = generator.choice(spots)
            (copy / "ledger.db").write_bytes(_flipped(whole, at + generator.randrange(9), generator.randrange(8)))
            _verify(outcomes, "ledgers", f"bit flipped at {at}", arena, copy)
        for text in (b"no database", b"SQLite format 3\0" + b"\0" * 100, b"\0" * 8192):
            (copy / "ledger.db").write_bytes(text)
            _verify(outcomes, "ledgers", repr(text[:12]), arena, copy)
    for url in (
        "sqlite://",
        "sqlite:///:memory:",
        "nosuch://x/y",
        "postgresql://127.0.0.1:1/none",
        "://",
        "/",
        "/nonexistent/x",
    ):
        attempt(outcomes, "ledgers", url, ["verify", "--ledger", url])


def _spots(text: bytes, word: bytes) -> list[int]:
    found, at = [], text.find(word)
    while at >= 0:
        found.append(at)
        at = text.find(word, at + 1)
    return found


def _flipped(text: bytes, at: int, bit: int) -> bytes:
    return text[:at] + bytes([text[at] ^ (1 << bit)]) + text[at + 1 :]


def certificates(outcomes: Outcomes, arena: Arena, seed: int, number: int) -> None:
    """Cut, flipped, re-encoded, of another key; every single bit of payload and signature counts."""
    generator, kind = random.Random(seed), "certificates"
    path, key = arena.folder / "forged.json", str(arena.folder / "operator.pub")
    whole = (arena.root / "certificates" / "request-000001.json").read_bytes()
    tree = json.loads(whole)

    def verify(case: str, text: bytes, public: str = key) -> None:
        path.write_bytes(text)
        if attempt(outcomes, kind, case, ["verify", "--certificate", str(path), "--key", public]) == 0:
            outcomes.wrong(kind, case, "verified")

    payload = base64.b64decode(tree["payload"])
    for _ in range(number):
        at, bit = generator.randrange(len(payload)), generator.randrange(8)
        changed = base64.b64encode(_flipped(payload, at, bit)).decode()
        verify(f"payload bit {8 * at + bit}", json.dumps(tree | {"payload": changed}).encode())
        signature = tree["signatures"][0]["sig"]
        raw = base64.b64decode(signature)
        forged = base64.b64encode(_flipped(raw, generator.randrange(len(raw)), bit)).decode()
        signatures = [tree["signatures"][0] | {"sig": forged}]
        verify("a signature's bit", json.dumps(tree | {"signatures": signatures}).encode())
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        verify(f"cut to {length}", whole[:length])
    for text in (b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, json.dumps(tree | {"signatures": []}).encode()):
        verify(repr(text[:20]), text)
    for name in tree:
        verify(f"without {name}", json.dumps({k: v for k, v in tree.items() if k != name}).encode())
    other = arena.folder / "other.key"
    generate_key(other)
    verify("another's key", whole, str(other.with_suffix(".pub")))
    for text in (b"", b"no key", (arena.folder / "operator.key").read_bytes()):
        (arena.folder / "bad.pub").write_bytes(text)
        verify("no key", whole, str(arena.folder / "bad.pub"))


def checkpoints(outcomes: Outcomes, arena: Arena, seed: int, number: int) -> None:
    """Files of the current state and of a job's model, cut short or with a flipped bit."""
    generator = random.Random(seed)
    state = next(path for path in sorted((arena.root / "states").iterdir(), reverse=True) if path.is_dir())
    weights = state / "checkpoint" / "model.safetensors"
    whole = weights.read_bytes()

    def damaged() -> Iterator[tuple[str, bytes]]:
        for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
            yield f"cut to {length}", whole[:length]
        for _ in range(number):
            at, bit = generator.randrange(len(whole)), generator.randrange(8)
            yield f"bit {8 * at + bit}", _flipped(whole, at, bit)

    for case, text in damaged():
        with _copied(arena) as copy:
            (copy / weights.relative_to(arena.root)).write_bytes(text)
            _verify(outcomes, "safetensors, verify", case, arena, copy)
    _next_rounds(outcomes, arena, weights.relative_to(arena.root), damaged)
    _sources(outcomes, arena, whole, damaged)


def _next_rounds(
    outcomes: Outcomes, arena: Arena, weights: Path, damaged: Callable[[], Iterator[tuple[str, bytes]]]
) -> None:
    """A round must not go on from a state that is not the one that was committed."""
    tree = yaml.safe_load(arena.file.read_text()) | {"folder": str(arena.folder / "copy")}
    path = arena.folder / "copied.yaml"
    path.write_text(yaml.safe_dump(tree))
    for case, text in damaged():
        with _copied(arena) as copy:
            call(["request", "add", "--service", str(path), "--subject", arena.people[-1]])
            (copy / weights).write_bytes(text)
            if attempt(outcomes, "safetensors, next round", case, ["rounds", "run-once", str(path)]) == 0:
                outcomes.wrong("safetensors, next round", case, "a round went on from it")


def _sources(
    outcomes: Outcomes, arena: Arena, whole: bytes, damaged: Callable[[], Iterator[tuple[str, bytes]]]
) -> None:
    """A job's own model: what is cut short or has another header is refused; a flipped weight is another model."""
    model = Path(shutil.copytree(arena.folder / "tiny" / "model", arena.folder / "model"))
    tree = yaml.safe_load((arena.folder / "job.yaml").read_text())
    tree |= {
        "model": {"path": str(model)},
        "forget": {"subjects": [arena.people[0]]},
        "output": str(arena.folder / "none"),
    }
    job = arena.folder / "source.yaml"
    job.write_text(yaml.safe_dump(tree))
    header = 8 + int.from_bytes(whole[:8], "little")
    for case, text in damaged():
        (model / "model.safetensors").write_bytes(text)
        code = attempt(outcomes, "safetensors, a job's model", case, ["plan", str(job)])
        if code == 0 and (case.startswith("cut") or len(text) < header):
            outcomes.wrong("safetensors, a job's model", case, "was accepted")
    shutil.rmtree(model)
