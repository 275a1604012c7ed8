"""The arguments of the service's commands, and which file of `commands` carries each out; nothing heavy is imported."""

import argparse
import importlib.util
from pathlib import Path

from rich.console import Console

from distributed_unlearn.errors import ConfigError

Commands = argparse._SubParsersAction
SERVICE_COMMANDS = ("request", "verify", "key", "rounds", "status")
_NEEDED = ("alembic", "apscheduler", "cryptography", "fastapi", "securesystemslib", "sqlalchemy", "uvicorn")


def add_service_commands(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add `request`, `verify`, `key`, `rounds` and `status`."""
    _add_request(commands)
    _add_verify(commands)
    key = commands.add_parser("key", help="the operator's signing key").add_subparsers(dest="action", required=True)
    generate = key.add_parser("generate", help="a new Ed25519 key: PATH (mode 0600) and PATH with suffix .pub")
    generate.add_argument("path", type=Path)
    _add_rounds(commands)
    status = commands.add_parser("status", help="one screen about a service")
    status.add_argument("service", type=Path, help="service file (YAML)")
    status.add_argument("--json", action="store_true", help="print JSON")


def _add_rounds(commands: "Commands[argparse.ArgumentParser]") -> None:
    actions = commands.add_parser("rounds", help="rounds of the service").add_subparsers(dest="action", required=True)
    once = actions.add_parser("run-once", help="run one round over the pending requests; commit it or roll it back")
    once.add_argument("--tick", help="run only if this tick (YYYYMMDDTHHMMSSZ) and no later one was taken before")
    # For `rounds schedule`: a pass must not outlive the scheduler that began it.
    once.add_argument("--end-with-stdin", action="store_true", help=argparse.SUPPRESS)
    schedule = actions.add_parser("schedule", help="run rounds at their time, until a signal ends it")
    manifest = actions.add_parser("manifest", help="print a systemd unit, or a Kubernetes CronJob for KubeRay")
    manifest.add_argument("--kind", choices=("systemd", "kubernetes"), required=True)
    manifest.add_argument("--image", help="kubernetes: with this package, Ray and DeepSpeed")
    manifest.add_argument("--kubectl-image", help="kubernetes: with kubectl, sh, sed and date")
    manifest.add_argument("--claim", help="kubernetes: persistent volume claim with the service's folder and files")
    for parser in (once, schedule, manifest):
        parser.add_argument("service", type=Path, help="service file (YAML)")
        parser.add_argument("overrides", nargs="*", help="section.key=value")


def _ledger(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--ledger", help="path of an SQLite file, or a database URL")
    where.add_argument("--service", type=Path, help="service file that names the ledger and the policy")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_request(commands: "Commands[argparse.ArgumentParser]") -> None:
    actions = commands.add_parser("request", help="erasure requests").add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="take a request in; makes the ledger if there is none")
    add.add_argument("--subject", action="append", default=[], metavar="ID", help="all records of a subject")
    add.add_argument("--record-id", action="append", default=[], metavar="ID")
    add.add_argument("--file", type=Path, help="record ids, one a line")
    add.add_argument("--external-id", help="the sender's own id: the same request again changes nothing")
    add.add_argument("--policy", choices=("default", "california"), default="default", help="which due date")
    add.add_argument("--due", help="due date, ISO 8601, instead of the policy's")
    listed = actions.add_parser("list", help="all requests")
    listed.add_argument("--state", action="append", default=[], help="only those in this state")
    show = actions.add_parser("show", help="one request")
    cancel = actions.add_parser("cancel", help="the operator withdraws a request")
    cancel.add_argument("--reason", choices=("exempt", "mistaken"), required=True)
    revoke = actions.add_parser("revoke", help="the subject withdraws a request")
    for numbered in (show, cancel, revoke):
        numbered.add_argument("number", type=int)
    serve = actions.add_parser("serve", help="the HTTP endpoint of a service file")
    serve.add_argument("service", type=Path)
    for parser in (add, listed, show, cancel, revoke):
        _ledger(parser)


def _add_verify(commands: "Commands[argparse.ArgumentParser]") -> None:
    verify = commands.add_parser("verify", help="verify a ledger with its files, or a certificate alone")
    what = verify.add_mutually_exclusive_group(required=True)
    what.add_argument("--ledger", help="path of an SQLite file, or a database URL")
    what.add_argument("--certificate", type=Path, help="works offline, without the ledger")
    verify.add_argument("--key", type=Path, action="append", default=[], help="public key; of several, any may sign")
    verify.add_argument("--root", type=Path, help="the service's folder; default: the folder of an SQLite ledger")
    verify.add_argument("--expect-head", metavar="SEQ:HASH", help="an entry that was noted, e.g. on a certificate")
    verify.add_argument("--json", action="store_true", help="print JSON")


def run_service_command(arguments: argparse.Namespace, console: Console) -> None:
    """Carry a command out.

    Raises:
        ConfigError: the extra `service` is not installed.
        UserError: whatever the command refuses.
    """
    require_service_extra(arguments.command)
    if arguments.command == "request":
        from distributed_unlearn.commands.request import run_request

        run_request(arguments, console)
    elif arguments.command == "rounds":
        from distributed_unlearn.commands.rounds import run_rounds

        run_rounds(arguments, console)
    elif arguments.command == "status":
        from distributed_unlearn.commands.status import run_status

        run_status(arguments, console)
    elif arguments.command == "key":
        from distributed_unlearn.service.keys import generate_key

        public = generate_key(arguments.path.expanduser())
        console.print(f"private key: {arguments.path}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"public key:  {public}", markup=False, highlight=False, soft_wrap=True)
    else:
        from distributed_unlearn.commands.verify import run_verify

        run_verify(arguments, console)


def require_service_extra(command: str) -> None:
    """Refuse a command whose packages are not installed.

    Raises:
        ConfigError: naming them.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"'{command}' without the package(s) {', '.join(missing)}",
            "the extra `service`",
            "pip install 'distributed-unlearn[service]'",
        )
