"""`rounds run-once | schedule | manifest`: one pass on the workers of the job, passes at their time, or their unit."""

import argparse
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from distributed_unlearn.commands.console_events import ConsoleEvents, print_line
from distributed_unlearn.commands.run import run_job
from distributed_unlearn.config.service import ServiceConfig, load_service
from distributed_unlearn.errors import ConfigError, GateError
from distributed_unlearn.logs import use_json_lines
from distributed_unlearn.records import StepRecord
from distributed_unlearn.rounds.events import OnStep
from distributed_unlearn.service.driver import Pass, run_pass, service_job
from distributed_unlearn.service.lease import HeldLease
from distributed_unlearn.service.manifest import Images, kubernetes_manifest, systemd_unit
from distributed_unlearn.service.opening import opened
from distributed_unlearn.service.overview import waiting
from distributed_unlearn.service.schedule import cron_trigger, take_tick

_STDIN = 0


def run_rounds(arguments: argparse.Namespace, console: Console) -> None:
    """Carry out one of the actions.

    Raises:
        GateError: a round was run and rolled back.
        UserError: whatever is refused or ends a round.
    """
    config = load_service(arguments.service, arguments.overrides)
    if arguments.action == "manifest":
        _print_manifest(config, arguments, console)
        return
    if arguments.action == "schedule":
        from distributed_unlearn.commands.schedule import run_schedule

        run_schedule(config, arguments.service, arguments.overrides, console)
        return
    if arguments.end_with_stdin:
        threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    with opened(config) as service:
        if arguments.tick is not None and not take_tick(service.ledger, service.held.lease, arguments.tick):
            print_line(console, f"tick {arguments.tick} was taken before; nothing was done")
            return
        events = LeasedEvents(console, service.held)
        if service.job.cluster.log_format == "json":
            use_json_lines(rank=None)
        found = run_pass(service, lambda job: run_job(job, events, queue=lambda: waiting(service.ledger)).record)
    tell(found, console)


def _end_with_stdin() -> None:
    """End this process in order, as a signal would, once nobody holds the other end of its standard input."""
    while os.read(_STDIN, 1024):  # not by `sys.stdin`, whose lock would be held while Python shuts down
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _print_manifest(config: ServiceConfig, arguments: argparse.Namespace, console: Console) -> None:
    cron_trigger(config.schedule)  # refused here rather than by whoever reads the manifest
    if arguments.kind == "systemd":
        text = systemd_unit(config, arguments.service, arguments.overrides)
    elif None in (arguments.image, arguments.kubectl_image, arguments.claim):
        raise ConfigError(
            "a manifest for kubernetes without --image, --kubectl-image or --claim",
            "all three",
            "say what the pods run and where they write",
        )
    else:
        images = Images(arguments.image, arguments.kubectl_image, arguments.claim)
        cluster = service_job(config).cluster
        text = kubernetes_manifest(config, arguments.service, cluster, images, arguments.overrides)
    console.out(text, end="", highlight=False)


class LeasedEvents(ConsoleEvents):
    """Those of the console; a lease that was lost ends the round at its next step."""

    def __init__(self, console: Console, held: HeldLease) -> None:
        super().__init__(console)
        self._held = held

    @contextmanager
    def round(self, round_index: int, num_rounds: int, max_steps: int) -> Iterator[OnStep]:
        """A bar over the round's steps.

        Raises:
            LeaseError: at a step after the lease was lost.
        """
        with super().round(round_index, num_rounds, max_steps) as tell:

            def on_step(record: StepRecord, measured: Mapping[str, float]) -> None:
                self._held.require()
                tell(record, measured)

            yield on_step


def tell(found: Pass, console: Console) -> None:
    """Say what a pass did, for people and, in the last line, for programs.

    Raises:
        GateError: its round was rolled back.
    """
    if found.interrupted is not None:
        print_line(console, f"round {found.interrupted} had been interrupted and was rolled back")
    if found.round is None:
        print_line(console, "nothing to erase")
    summary: Mapping[str, object] = {
        "round": None if found.round is None else found.round.number,
        "committed": found.round is not None and not found.failed_gates,
        "failed_gates": found.failed_gates,
        "denied": found.denied,
        "missing": found.missing,
        "certificates": found.certificates,
        "purged_requests": found.purged_requests,
        "purged_states": found.purged_states,
        "drift_nats": found.drift_nats,
        "retraining_recommended": found.retraining_recommended,
    }
    if found.retraining_recommended:
        print_line(console, f"the drift budget is used up ({found.drift_nats:.3f} nats per token): retrain the model")
    print_line(console, json.dumps(summary))
    if found.failed_gates and found.round is not None:
        raise GateError(
            f"round {found.round.number}, which was rolled back: {'; '.join(found.failed_gates)}",
            "a round that passes every gate",
            "see the job's solver and objective, or `gates` in the service file; the requests are pending again",
        )
