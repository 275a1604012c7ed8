"""Certificates: for every answered request an in-toto Statement v1 in a DSSE envelope, signed by the operator.

The statement names files by hash and people not at all: ids stand in it as hashes with a salt of the certificate's own,
so that whoever holds an id and the certificate can tell that it was meant. Verification needs the file and the public
key, nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, Key

from distributed_unlearn.errors import CheckFailedError, DataError
from distributed_unlearn.provenance import hash_ids, new_salt
from distributed_unlearn.service.canonical import canonical_json, time_text
from distributed_unlearn.service.heads import Head
from distributed_unlearn.service.requests import ErasureRequest
from distributed_unlearn.service.rounds_book import RoundEntry

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:distributed-unlearn:erasure-certificate:v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
APPROXIMATE = (
    "Erasure from a trained model is approximate: the weights were changed until the measurements below were met. They "
    "are not the weights of a model that was trained without the records, and no measurement proves that nothing of "
    "the records can be recovered."
)


@dataclass(frozen=True)
class Answer:
    """All that a certificate is made from."""

    request: ErasureRequest
    head: Head
    """An end of the audit trail after the answer: ties the certificate to the ledger."""
    round: RoundEntry | None
    """The round that erased; None where nothing was erased."""
    record: Mapping[str, Any] | None
    """`record.json` of that round, as read."""
    num_erased_records: int


def make_statement(answer: Answer) -> dict[str, Any]:
    """The in-toto statement; its subjects are the files of the result or, without a round, the ledger's entry."""
    request, salt = answer.request, new_salt()
    names = [*(f"subject\0{name}" for name in request.subjects), *(f"record\0{name}" for name in request.record_ids)]
    predicate: dict[str, Any] = {
        "request": {
            "number": request.number,
            "policy": request.policy,
            "received_at": time_text(request.received_at),
            "due_at": time_text(request.due_at),
            "num_ids": request.num_ids,
            "num_erased_records": answer.num_erased_records,
            "salt": salt,
            "ids_sha256_salted": hash_ids(names, salt),
        },
        "answer": {
            "state": request.state.value,
            "reason": None if request.reason is None else request.reason.value,
            "outcome": None if request.outcome is None else request.outcome.value,
            "answered_at": time_text(request.moved_at),
        },
        "ledger": {"id": answer.head.ledger_id, "entry": answer.head.seq, "sha256": answer.head.hash},
        "round": None if answer.round is None else _round(answer.round, answer.record or {}),
        "approximate": APPROXIMATE if answer.round is not None else None,
    }
    files = {} if answer.record is None else _result_files(answer.record)
    if not files:
        files = {f"ledger/{answer.head.ledger_id}#{answer.head.seq}": answer.head.hash}
    subjects = [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())]
    return {"_type": STATEMENT_TYPE, "subject": subjects, "predicateType": PREDICATE_TYPE, "predicate": predicate}


def _result_files(record: Mapping[str, Any]) -> dict[str, str]:
    files = (record.get("result") or {}).get("files") or {}
    return {str(name): str(digest) for name, digest in files.items()}


def _round(entry: RoundEntry, record: Mapping[str, Any]) -> dict[str, Any]:
    rounds: Sequence[Mapping[str, Any]] = record.get("rounds") or [{}]
    last, config = rounds[-1], record.get("config") or {}
    steps = [step for step in last.get("steps") or () if step.get("accepted")]
    counts = ("num_forget_records", "num_retain_records", "num_steps", "num_products", "update_norm", "stop_reason")
    return {
        "number": entry.number,
        "parent": entry.parent,
        "started_at": time_text(entry.started_at),
        "ended_at": None if entry.ended_at is None else time_text(entry.ended_at),
        "record_sha256": entry.record_sha256,
        "weights_before": (record.get("base") or {}).get("files"),
        "weights_after": _result_files(record),
        "settings": {key: config.get(key) for key in ("objective", "solver", "curvature")},
        "versions": record.get("versions"),
        **{key: last.get(key) for key in counts},
        "alpha": _range(steps, "alpha"),
        "gamma": _range(steps, "gamma"),
        "surviving_update": record.get("surviving_update"),
        "scores": {"before": last.get("before"), "after": last.get("after")},
        "exposure": last.get("exposure"),
        "verdict": last.get("verdict"),
        "retrained": record.get("retrained"),
    }


def _range(steps: Sequence[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    """First, last and largest over the accepted steps; None where no step has it."""
    values = [step[name] for step in steps if step.get(name) is not None]
    return None if not values else {"first": values[0], "last": values[-1], "largest": max(values)}


def sign_statement(statement: Mapping[str, Any], signer: CryptoSigner) -> str:
    """The DSSE envelope of a statement, as JSON text."""
    envelope = Envelope(canonical_json(statement).encode(), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return json.dumps(envelope.to_dict(), indent=2, sort_keys=True) + "\n"


def verify_certificate(path: Path, keys: Sequence[Key]) -> dict[str, Any]:
    """The statement of a certificate that one of `keys` signed.

    Raises:
        DataError: no such file, or no certificate.
        CheckFailedError: no signature of these keys, or a changed payload.
    """
    refusal = DataError(f"'{path}', which is no certificate", "a DSSE envelope with an in-toto statement", "check it")
    try:
        tree = json.loads(path.read_bytes())
        envelope = Envelope.from_dict(tree)
    except OSError as error:
        raise DataError(
            f"certificate '{path}', which cannot be read ({error.strerror})", "a certificate", "check the path"
        ) from error
    except Exception:  # whatever the library makes of a file that anybody may have written
        raise refusal from None
    try:
        envelope.verify(list(keys), threshold=1)
    except (VerificationError, ValueError) as error:
        raise CheckFailedError(
            f"certificate '{path}', which none of the {len(keys)} key(s) signed as it is",
            "a signature of the operator's key over the unchanged statement",
            "ask the operator for the right public key; else the certificate was changed or forged",
        ) from error
    if envelope.payload_type != PAYLOAD_TYPE:
        raise refusal
    return _statement_in(envelope.payload, refusal)


def _statement_in(payload: bytes, refusal: DataError) -> dict[str, Any]:
    try:
        statement = json.loads(payload)
    except ValueError:
        raise refusal from None
    if not isinstance(statement, dict) or statement.get("_type") != STATEMENT_TYPE:
        raise refusal
    if statement.get("predicateType") != PREDICATE_TYPE or not isinstance(statement.get("predicate"), dict):
        raise refusal
    return statement
