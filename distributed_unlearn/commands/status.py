"""`status`: one screen about a service."""

import argparse
import json
from dataclasses import asdict
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distributed_unlearn.config.service import load_service
from distributed_unlearn.service.canonical import time_text
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.overview import Overview, look
from distributed_unlearn.service.rounds_book import RoundEntry


def run_status(arguments: argparse.Namespace, console: Console) -> None:
    """Show what is pending, what runs, when the next round is, and the last outcomes.

    Raises:
        ConfigError, LedgerError: the service file or its ledger cannot be read.
    """
    config = load_service(arguments.service, [])
    found = look(open_ledger(config.ledger_url), config)
    if arguments.json:
        tree = {**asdict(found), "last_answers": [request.to_json() for request in found.last_answers]}
        text = json.dumps(tree, default=lambda value: time_text(value) if isinstance(value, datetime) else str(value))
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    table = Table("what", "value")
    for name, value in _rows(found):
        table.add_row(Text(name), Text(value))
    console.print(table)


def _rows(found: Overview) -> list[tuple[str, str]]:
    states = ", ".join(f"{number} {state}" for state, number in sorted(found.num_by_state.items())) or "none"
    age = found.oldest_open_seconds
    rows = [
        ("requests", states),
        ("oldest without an answer", "none" if age is None else f"{age / 86400:.1f} days"),
        ("overdue", _numbers(found.overdue)),
        ("due soon", _numbers(found.due_soon)),
        ("runs", "nothing" if found.open_round is None else f"round {found.open_round.number}"),
        ("lease", found.holder or "free"),
        ("current state", "the first model" if found.current is None else f"round {found.current.number}"),
        ("next tick", "never" if found.next_tick is None else f"{found.next_tick:%Y-%m-%d %H:%M} UTC"),
        ("webhooks waiting", str(found.num_webhooks_waiting)),
        ("audit entries", str(found.num_audit_entries)),
        ("drift", f"{found.drift_nats:.3f} nats" + (": RETRAIN" if found.retraining_recommended else "")),
    ]
    rows += [(f"round {entry.number}", _round(entry)) for entry in reversed(found.last_rounds)]
    for request in reversed(found.last_answers):
        outcome = request.state.value if request.outcome is None else request.outcome.value
        rows.append((f"request {request.number}", f"{outcome}, {request.moved_at:%Y-%m-%d %H:%M} UTC"))
    return rows


def _numbers(requests: tuple[int, ...]) -> str:
    return ", ".join(map(str, requests)) or "none"


def _round(entry: RoundEntry) -> str:
    ended = "" if entry.ended_at is None else f", {entry.ended_at:%Y-%m-%d %H:%M} UTC"
    return f"{entry.state.value.replace('_', ' ')}{ended}" + (f": {entry.reason}" if entry.reason else "")
