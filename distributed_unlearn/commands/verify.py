"""`verify`: a ledger with its records and checkpoints, or a certificate alone and offline."""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distributed_unlearn.errors import CheckFailedError, ConfigError
from distributed_unlearn.service.certificate import verify_certificate
from distributed_unlearn.service.database import ledger_url
from distributed_unlearn.service.keys import load_public_key
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.verification import verify_ledger


def run_verify(arguments: argparse.Namespace, console: Console) -> None:
    """Verify and say what was verified.

    Raises:
        CheckFailedError: naming the first broken entry.
        ConfigError, DataError, LedgerError: what is to be verified cannot be read.
    """
    keys = [load_public_key(path) for path in arguments.key]
    if arguments.certificate is not None:
        if not keys:
            raise ConfigError("--certificate without --key", "the operator's public key", "give --key operator.pub")
        statement = verify_certificate(arguments.certificate, keys)
        if arguments.json:
            console.print(json.dumps(statement), markup=False, highlight=False, soft_wrap=True)
            return
        console.print(_table(_certificate_rows(statement["predicate"])))
        console.print("the certificate is the operator's, and unchanged")
        return
    root = _root(arguments)
    ledger = open_ledger(arguments.ledger)
    found = verify_ledger(ledger, root, keys, _expected_head(arguments.expect_head))
    if arguments.json:
        console.print(json.dumps(asdict(found)), markup=False, highlight=False, soft_wrap=True)
    if found.broken is not None:
        raise CheckFailedError(
            found.broken, "everything as the audit trail says", "restore a backup; see docs/runbook.md"
        )
    if arguments.json:
        return
    signed = "not looked at: give --key" if not keys else f"{found.num_signed_heads}, up to entry {found.last_signed}"
    files = "not looked at: give --root" if root is None else str(found.num_files)
    rows = [("audit entries", str(found.num_entries)), ("signed heads", signed), ("files", files)]
    console.print(_table(rows))
    console.print("the ledger verifies")


def _certificate_rows(predicate: dict[str, object]) -> list[tuple[str, str]]:
    rows = []
    for part in ("request", "answer", "ledger"):
        section = predicate.get(part)
        for key, value in section.items() if isinstance(section, dict) else ():
            if not isinstance(value, list):
                rows.append((f"{part}: {key}", str(value)))
    return rows


def _table(rows: list[tuple[str, str]]) -> Table:
    table = Table("what", "value")
    for name, value in rows:
        table.add_row(Text(name), Text(value))  # texts: a bracket is no markup
    return table


def _root(arguments: argparse.Namespace) -> Path | None:
    if arguments.root is not None:
        root: Path = arguments.root.expanduser()
        if not root.is_dir():
            raise ConfigError(f"--root '{root}', which is no folder", "the service's folder", "correct the path")
        return root
    url = ledger_url(arguments.ledger)
    return Path(url.database or "").parent if url.get_backend_name() == "sqlite" else None


def _expected_head(text: str | None) -> tuple[int, str] | None:
    if text is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,8}:[0-9a-f]{64}", text):
        raise ConfigError("--expect-head that is no entry", "NUMBER:HASH, the hash in 64 digits", "see a certificate")
    number, _, digest = text.partition(":")
    return int(number), digest
