"""`request add | list | show | cancel | revoke | serve`: the requests of a ledger, for people and for programs."""

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distributed_unlearn.config.service import RequestsConfig, load_service
from distributed_unlearn.data.selection import read_ids
from distributed_unlearn.errors import RequestError
from distributed_unlearn.service.canonical import read_date
from distributed_unlearn.service.ledger import Ledger, open_ledger, service_ledger
from distributed_unlearn.service.requests import (
    ErasureRequest,
    NewRequest,
    add_request,
    get_request,
    list_requests,
    withdraw,
)
from distributed_unlearn.service.states import Reason, RequestState


def run_request(arguments: argparse.Namespace, console: Console) -> None:
    """Carry out one of the actions.

    Raises:
        ConfigError, LedgerError, RequestError: whatever is refused; nothing was written.
    """
    if arguments.action == "serve":
        from distributed_unlearn.service.http import serve

        serve(load_service(arguments.service, []))
        return
    service = None if arguments.service is None else load_service(arguments.service, [])
    new = _new_request(arguments) if arguments.action == "add" else None  # refused before a ledger is made
    if service is not None and new is not None:
        ledger = service_ledger(service)
    else:
        url = arguments.ledger if service is None else service.ledger_url
        ledger = open_ledger(url, create=new is not None)
    if new is not None:
        policy = RequestsConfig() if service is None else service.requests
        found = [add_request(ledger, new, policy, webhook=service is not None and service.webhook is not None)]
    elif arguments.action == "list":
        found = list_requests(ledger, _states(arguments.state))
    else:
        found = [_one(ledger, arguments)]
    if arguments.json:
        value = [r.to_json() for r in found] if arguments.action == "list" else found[0].to_json()
        console.print(json.dumps(value), markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(request_table(found))
    _warn_of_late(found)


def _new_request(arguments: argparse.Namespace) -> NewRequest:
    from_file = [] if arguments.file is None else read_ids(str(arguments.file))
    return NewRequest(
        subjects=tuple(arguments.subject),
        record_ids=(*arguments.record_id, *from_file),
        external_id=arguments.external_id,
        policy=arguments.policy,
        due=None if arguments.due is None else read_date(arguments.due, "--due"),
    )


def _one(ledger: Ledger, arguments: argparse.Namespace) -> ErasureRequest:
    if arguments.action == "cancel":
        return withdraw(ledger, arguments.number, Reason(arguments.reason), RequestState.CANCELLED)
    if arguments.action == "revoke":
        return withdraw(ledger, arguments.number, Reason.WITHDRAWN, RequestState.REVOKED)
    return get_request(ledger, arguments.number)


def _states(names: Sequence[str]) -> list[RequestState]:
    known = [state.value for state in RequestState]
    for name in names:
        if name not in known:
            raise RequestError(f"--state {name}", f"one of {', '.join(known)}", "correct the state")
    return [RequestState(name) for name in names]


def request_table(requests: Sequence[ErasureRequest]) -> Table:
    """Requests as a table; ids are counted, not shown: `--json` has them."""
    table = Table("request", "state", "status", "outcome", "round", "ids", "received", "due", "external id")
    for request in requests:
        state = request.state.value
        if request.reason is not None:
            state += f" ({request.reason.value})"
        if request.duplicate_of is not None:
            state += f", duplicate of {request.duplicate_of}"
        cells = (
            str(request.number),
            state,
            request.status.value,
            "" if request.outcome is None else request.outcome.value,
            "" if request.round_number is None else str(request.round_number),
            str(request.num_ids),
            f"{request.received_at:%Y-%m-%d %H:%M}",
            f"{request.due_at:%Y-%m-%d}" + (" OVERDUE" if request.overdue else ""),
            request.external_id or "",
        )
        table.add_row(*map(Text, cells))  # texts: a bracket in an id is no markup
    return table


def _warn_of_late(found: Sequence[ErasureRequest]) -> None:
    late = [str(request.number) for request in found if request.overdue]
    if late:
        text = f"warning: overdue: request(s) {', '.join(late)}"
        Console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
