"""One pass of the service: mend what a crash left, take the pending requests, run a round, commit it or roll it back.

What must survive is in the ledger, and every step below can be the last: whatever was not committed is gone on with by
the next pass or rolled back, what was committed but not published is published, what was answered is certified.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from sqlalchemy import update

from distributed_unlearn.config import AdapterFolder, JobConfig, ModelConfig, SelectionConfig, load_job, parse_job
from distributed_unlearn.config.service import ServiceConfig
from distributed_unlearn.errors import ConfigError, DataError, LedgerError, ResourceError, UserError, WorkerError
from distributed_unlearn.provenance import hash_folder
from distributed_unlearn.records import RunRecord
from distributed_unlearn.rounds.state import STATE_FOLDER
from distributed_unlearn.service.answers import issue_certificates
from distributed_unlearn.service.fault_points import fault_points
from distributed_unlearn.service.gates import failed_gates, retain_loss_rise
from distributed_unlearn.service.heads import sign_head
from distributed_unlearn.service.lease import HeldLease
from distributed_unlearn.service.ledger import Ledger
from distributed_unlearn.service.publication import publish
from distributed_unlearn.service.requests import ErasureRequest, list_requests
from distributed_unlearn.service.resolution import Resolution, dropped, held_out, read_identities, resolve
from distributed_unlearn.service.retention import purge, state_folder, sweep
from distributed_unlearn.service.rounds_book import (
    RoundEntry,
    StateFiles,
    commit_round,
    current_round,
    deny,
    drift,
    erased_in_rounds,
    open_round,
    resume_round,
    roll_back,
    schedule_ripe,
    start_round,
)
from distributed_unlearn.service.secrets_file import read_secret
from distributed_unlearn.service.seen import look_again
from distributed_unlearn.service.states import FINAL_STATES, Reason, RequestState
from distributed_unlearn.service.tables import REQUESTS
from distributed_unlearn.service.verification import broken_state
from distributed_unlearn.service.webhook import Deliveries, deliver

_LOG = logging.getLogger(__name__)
Execute = Callable[[JobConfig], RunRecord]
"""Runs a job in its output folder, on workers that it opens and ends; returns the record as it was written."""


@dataclass(frozen=True, eq=False)
class Service:
    """A service file with what it names, opened; the lease is held."""

    config: ServiceConfig
    job: JobConfig
    ledger: Ledger
    held: HeldLease
    signer: CryptoSigner

    @property
    def root(self) -> Path:
        """The service's folder."""
        return self.config.root.absolute()


@dataclass(frozen=True)
class Pass:
    """What one pass did."""

    interrupted: int | None
    """The round that was open when it began and was rolled back: its driver had died and left no state."""
    denied: tuple[int, ...]
    missing: tuple[int, ...]
    """Requests that wait because the data no longer holds what they name."""
    round: RoundEntry | None
    """The round that was run; None where nothing was pending."""
    failed_gates: tuple[str, ...]
    """Why it was rolled back; empty where it was committed."""
    certificates: tuple[int, ...]
    purged_requests: tuple[int, ...]
    purged_states: tuple[int, ...]
    drift_nats: float
    retraining_recommended: bool


def service_job(config: ServiceConfig) -> JobConfig:
    """The job file of a service, fit for rounds.

    Raises:
        ConfigError: it forgets or trains by itself, saves less than float32, holds whole classes out, or could not
            forget if it were asked to.
    """
    job = load_job(Path(config.job).expanduser(), list(config.overrides))
    if job.forget is not None or job.rounds is not None or job.train is not None:
        raise ConfigError(
            f"job '{config.job}' with forget, rounds or train", "a job without", "requests say what to forget"
        )
    if job.save.dtype not in (None, "float32"):
        raise ConfigError(
            f"save.dtype {job.save.dtype} in job '{config.job}'",
            "float32 or null",
            "rounds go on from each other's files, and small updates vanish in fewer bits; publish a converted copy",
        )
    if job.holdout is not None and job.holdout.classes:
        raise ConfigError(
            f"holdout.classes in job '{config.job}'",
            "subjects, record_ids, ids_file or path",
            "name the held-out records: a request for one of them is answered by its id, without reading labels",
        )
    if isinstance(job.model.adapter, AdapterFolder) and job.save.adapter == "merged":
        raise ConfigError(
            f"save.adapter merged with an adapter's folder in job '{config.job}'",
            "save.adapter: adapter",
            "merged into its base the adapter is gone, and the next round could not go on from it",
        )
    asked = {**job.model_dump(), "forget": {"record_ids": ["any"]}}
    parse_job(asked, config.job)  # what a job that forgets must have besides, e.g. a holdout
    return job


def run_pass(service: Service, execute: Execute) -> Pass:
    """One pass.

    Raises:
        LeaseError: another scheduler has taken over; nothing was written since.
        UserError: the round could not be run; it was rolled back.
    """
    ledger, lease, root = service.ledger, service.held.lease, service.root
    interrupted, resumed = recover(service)
    schedule_ripe(ledger, lease)
    warn_of_due(service)
    pending, found = _pending(service, resumed)
    if resumed is not None and found.erase.keys() != {request.number for request in pending}:
        # The data has changed meanwhile: a commit would call requests erased whose records the round never saw.
        _give_up(service, resumed.number, Reason.INTERRUPTED, "its requests name other records than when it began")
        interrupted, resumed = resumed.number, None
        pending, found = _pending(service, None)
    if resumed is None and (found.denied or found.already):
        deny(ledger, lease, found.denied, found.already)
    for number in found.missing:
        _LOG.warning(
            "request %d names records that the data held before and holds no longer: put them back until it is erased, "
            "or cancel it",
            number,
        )
    entry, failed = (None, []) if not found.erase else _run_round(service, found, execute, resumed)
    publish(ledger, lease, root)
    certificates = issue_certificates(ledger, lease, root, service.signer)
    send_outcomes(service)  # before the purge, which may take away what they say
    purged = purge(ledger, lease, service.config.retention, root)
    sign_head(ledger, lease, service.signer)
    used, budget = drift(ledger), service.config.gates.drift_nats
    return Pass(
        interrupted,
        tuple(found.denied),
        found.missing,
        entry,
        tuple(failed),
        tuple(certificates),
        purged.requests,
        purged.states,
        used,
        budget is not None and used > budget,
    )


def recover(service: Service) -> tuple[int | None, RoundEntry | None]:
    """Take up the round of a driver that died, or roll it back; publish what was committed, remove what nothing knows.

    Returns:
        The number of the round that was rolled back; the open round to go on with.
    """
    ledger, lease, left = service.ledger, service.held.lease, open_round(service.ledger)
    resumed = left is not None and _has_state(service, left.number) and resume_round(ledger, lease, left.number)
    if left is not None and not resumed:
        roll_back(ledger, lease, left.number, Reason.INTERRUPTED, "its driver ended before it did")
    publish(ledger, lease, service.root)
    sweep(ledger, lease, service.root)
    return (None, left) if resumed else (None if left is None else left.number, None)


def _has_state(service: Service, number: int) -> bool:
    """Whether the round's folder holds a state from which a run can go on, and no result yet."""
    folder = service.root / state_folder(number)
    return not (folder / "checkpoint").exists() and any(folder.glob(f"{STATE_FOLDER}/round_*_step_*"))


def warn_of_due(service: Service) -> list[ErasureRequest]:
    """Open requests that are due soon or overdue; of each that is overdue the audit trail is told once."""
    now = service.ledger.clock()
    soon = now + timedelta(days=service.config.requests.warn_days)
    pressing = [r for r in list_requests(service.ledger) if r.state not in FINAL_STATES and r.due_at <= soon]
    with service.ledger.write(service.held.lease) as writing:
        for request in pressing:
            unwarned = (REQUESTS.c.id == request.number) & REQUESTS.c.warned.is_(False)
            warning = update(REQUESTS).where(unwarned).values(warned=True)
            if request.overdue and writing.connection.execute(warning).rowcount:
                writing.append("request_overdue", {"request": request.number})
    for request in pressing:
        word = "is overdue since" if request.overdue else "is due at"
        _LOG.warning("request %d %s %s", request.number, word, f"{request.due_at:%Y-%m-%d %H:%M} UTC")
    return pressing


def _pending(service: Service, resumed: RoundEntry | None) -> tuple[list[ErasureRequest], Resolution]:
    """The requests of the open round, or those that are scheduled; and what becomes of them."""
    state = RequestState.SCHEDULED if resumed is None else RequestState.IN_ROUND
    pending = list_requests(service.ledger, [state])
    return pending, _resolve(service, pending) if pending else Resolution()


def _resolve(service: Service, pending: Sequence[ErasureRequest]) -> Resolution:
    identities, salt, data = read_identities(service.job.data), service.ledger.salt(), service.job.data
    never = held_out(identities, service.job.holdout) | dropped(start_model(service), data)
    seen = look_again(service.root, salt, identities)
    return resolve(pending, identities, never, erased_in_rounds(service.ledger), salt, seen)


def start_model(service: Service) -> ModelConfig:
    """What the next round opens: the current state, or the first model."""
    current, model = current_round(service.ledger), service.job.model
    if current is None:
        return model
    assert current.folder is not None
    start = str(service.root / current.folder / "checkpoint")
    if model.adapter is not None and service.job.save.adapter == "adapter":
        return model.model_copy(update={"adapter": AdapterFolder(path=start)})  # the base stays, at its revision
    return model.model_copy(update={"path": start, "revision": None})


def round_job(service: Service, number: int, record_ids: Sequence[str], resume: bool = False) -> JobConfig:
    """The job of a round: from the current state, or the first model, into a folder of its own, in float32."""
    return service.job.model_copy(
        update={
            "model": start_model(service),
            "forget": SelectionConfig(record_ids=tuple(record_ids)),
            "save": service.job.save.model_copy(update={"dtype": "float32"}),
            "output": str(service.root / state_folder(number)),
            "overwrite": False,
            "resume": resume,
        }
    )


def _run_round(
    service: Service, found: Resolution, execute: Execute, resumed: RoundEntry | None
) -> tuple[RoundEntry, list[str]]:
    ledger, lease = service.ledger, service.held.lease
    _require_whole_parent(service)
    entry = start_round(ledger, lease, sorted(found.erase)) if resumed is None else resumed
    try:
        job = round_job(service, entry.number, found.record_ids, resume=resumed is not None)
        with fault_points():
            record = execute(job)
        service.held.require()
        failed = failed_gates(service.config.gates, record)
        if not failed:
            state = _state_files(service, entry.number, record)
            return commit_round(ledger, lease, entry.number, state, found.erase), []
    except (SystemExit, KeyboardInterrupt, WorkerError, ResourceError):
        if not _has_state(service, entry.number):
            _give_up(service, entry.number, Reason.INTERRUPTED, "the round was interrupted")
        raise  # with a state it stays open: the next pass goes on from there
    except BaseException as error:
        # Without the error's text, which may hold ids; whoever started the pass is told.
        kind = error.kind if isinstance(error, UserError) else type(error).__name__
        _give_up(service, entry.number, Reason.INTERRUPTED, f"the round ended with an error ({kind})")
        raise
    _give_up(service, entry.number, Reason.GATE_FAILED, "; ".join(failed))
    return entry, failed


def _require_whole_parent(service: Service) -> None:
    """Refuse to go on from a state that is not as it was committed: every later state would inherit the damage.

    Raises:
        LedgerError: naming the file; no round was begun, and the requests stay where they are.
    """
    current = current_round(service.ledger)
    broken = None if current is None else broken_state(service.ledger, service.root, current.number)
    if broken is not None:
        raise LedgerError(broken, "the current state as it was committed", "restore a backup; see docs/runbook.md")


def _give_up(service: Service, number: int, reason: Reason, text: str) -> None:
    still_open = open_round(service.ledger)
    if still_open is not None and still_open.number == number:
        roll_back(service.ledger, service.held.lease, number, reason, text)
    sweep(service.ledger, service.held.lease, service.root)


def _state_files(service: Service, number: int, record: RunRecord) -> StateFiles:
    folder = state_folder(number)
    path = service.root / folder
    files = hash_folder(path)
    if "record.json" not in files or not any(name.startswith("checkpoint/") for name in files):
        raise DataError(f"'{path}' without a record and a checkpoint", "the result of a round", "see the round's log")
    return StateFiles(folder, files["record.json"], files, retain_loss_rise(record))


def send_outcomes(service: Service) -> Deliveries | None:
    """Send the waiting webhooks; None where the service file has none."""
    config = service.config.webhook
    if config is None:
        return None
    secret = read_secret(config.secret_file, "webhook.secret_file")
    return deliver(service.ledger, service.held.lease, config, secret)
