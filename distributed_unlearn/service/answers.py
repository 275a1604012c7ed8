"""What follows an answer: the certificate of every request that has ended, as an envelope and as a page."""

import json
import logging
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from sqlalchemy import insert, select

from distributed_unlearn.errors import LedgerError
from distributed_unlearn.files import write_text
from distributed_unlearn.service.canonical import sha256
from distributed_unlearn.service.certificate import Answer, make_statement, sign_statement
from distributed_unlearn.service.certificate_page import certificate_page
from distributed_unlearn.service.fault_points import fault_points
from distributed_unlearn.service.heads import read_head
from distributed_unlearn.service.ledger import Lease, Ledger
from distributed_unlearn.service.requests import get_request
from distributed_unlearn.service.rounds_book import RoundEntry, erased_by, list_rounds
from distributed_unlearn.service.states import FINAL_STATES
from distributed_unlearn.service.tables import CERTIFICATES, REQUESTS

_LOG = logging.getLogger(__name__)
CERTIFICATES_FOLDER = "certificates"


def issue_certificates(ledger: Ledger, lease: Lease, root: Path, signer: CryptoSigner) -> list[int]:
    """Issue the certificate of every ended request that has none yet; returns their numbers.

    The files come first and the ledger's entry after them: a crash in between writes the files once more.
    """
    final = [state.value for state in FINAL_STATES]
    issued = select(CERTIFICATES.c.request_id)
    query = select(REQUESTS.c.id).where(REQUESTS.c.state.in_(final), REQUESTS.c.id.not_in(issued))
    with ledger.read() as connection:
        numbers = list(connection.execute(query.order_by(REQUESTS.c.id)).scalars())
    rounds = {entry.number: entry for entry in list_rounds(ledger)} if numbers else {}
    for number in numbers:
        _issue(ledger, lease, root, signer, number, rounds)
    return numbers


def _issue(
    ledger: Ledger, lease: Lease, root: Path, signer: CryptoSigner, number: int, rounds: dict[int, RoundEntry]
) -> None:
    request = get_request(ledger, number)
    entry = None if request.round_number is None else rounds[request.round_number]
    record = None if entry is None else _read_record(root, entry)
    answer = Answer(request, read_head(ledger), entry, record, erased_by(ledger, number))
    statement = make_statement(answer)
    envelope = sign_statement(statement, signer)
    path = f"{CERTIFICATES_FOLDER}/request-{number:06d}.json"
    (root / CERTIFICATES_FOLDER).mkdir(exist_ok=True)
    with fault_points():
        write_text(root / path, envelope)
    write_text((root / path).with_suffix(".html"), certificate_page(statement, sha256(envelope)))
    with ledger.write(lease) as writing:
        writing.connection.execute(insert(CERTIFICATES).values(request_id=number, sha256=sha256(envelope), path=path))
        writing.append("certificate_issued", {"request": number, "sha256": sha256(envelope)})


def _read_record(root: Path, entry: RoundEntry) -> dict[str, Any] | None:
    """The round's record; None once its state was purged, and where an older state was not restored from a backup."""
    if entry.folder is None:
        return None
    path = root / entry.folder / "record.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        _LOG.warning("'%s' is gone: certificates name its round without its measurements", path)
        return None
    except (OSError, ValueError) as error:
        raise LedgerError(
            f"the record '{path}', which cannot be read ({type(error).__name__})",
            "the record as the round wrote it",
            "restore it from a backup; see docs/runbook.md",
        ) from error
    return found
