"""`rounds schedule`: a small process that looks at clock and ledger, and runs each pass in a process of its own.

So a pass that dies takes nothing with it, and what a pass leaves in memory does not add up. The scheduler itself writes
to the ledger only to note a tick that passes with too few requests.
"""

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.blocking import BlockingScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger
from rich.console import Console

from distributed_unlearn.cluster.authentication import ray_address
from distributed_unlearn.commands.console_events import print_line
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.config.service import ServiceConfig
from distributed_unlearn.errors import LeaseError, LedgerError
from distributed_unlearn.logs import use_json_lines
from distributed_unlearn.service.driver import service_job
from distributed_unlearn.service.lease import held
from distributed_unlearn.service.ledger import Ledger, service_ledger
from distributed_unlearn.service.overview import waiting
from distributed_unlearn.service.schedule import cron_trigger, find_due, take_tick

_LOG = logging.getLogger(__name__)


class Passes:
    """Starts a pass when one is due, and waits for it: one at a time."""

    def __init__(
        self, config: ServiceConfig, ledger: Ledger, trigger: CronTrigger, command: Sequence[str], console: Console
    ) -> None:
        self._config, self._ledger, self._trigger = config, ledger, trigger
        self._command, self._console = list(command), console
        self._child: subprocess.Popen[bytes] | None = None
        self.tell_queue: Callable[[int, float | None], None] = lambda length, oldest_seconds: None
        """Told at every look how many requests wait, and for how long the oldest."""
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether no other pass will begin."""
        return self._ended

    def look(self) -> None:
        """Begin what is due. A ledger that does not answer, or a lease that is held, is looked at again next time."""
        try:
            self.tell_queue(*waiting(self._ledger))
            due = find_due(self._ledger, self._config, self._trigger)
            if due is None or self._ended:
                return
            if not due.runs and due.tick is not None:
                with held(self._ledger, self._config.lease_seconds) as keeper:
                    take_tick(self._ledger, keeper.lease, due.tick)
                print_line(self._console, f"{due.tick}: {due.why}; fewer than schedule.min_requests, no round")
                return
        except (LedgerError, LeaseError) as error:
            _LOG.warning("%s", error)
            return
        print_line(self._console, f"{due.tick or 'between ticks'}: {due.why}")
        tick = [] if due.tick is None else ["--tick", due.tick]
        # The pipe ends with this process, however it ends, and the pass with the pipe.
        self._child = subprocess.Popen([*self._command, *tick, "--end-with-stdin"], stdin=subprocess.PIPE)
        if self._ended:  # by a signal that came while it was started
            self._child.terminate()
        code = self._child.wait()
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child = None
        print_line(self._console, f"the pass ended with exit code {code}")

    def end(self) -> None:
        """End the running pass as a signal would, and begin no other."""
        self._ended, child = True, self._child
        if child is not None:
            child.terminate()


def run_schedule(config: ServiceConfig, path: Path, overrides: Sequence[str], console: Console) -> None:
    """Run until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ConfigError: job or schedule are unfit; LedgerError: the ledger cannot be opened.
    """
    trigger = cron_trigger(config.schedule)
    job = service_job(config)
    if job.cluster.log_format == "json":
        use_json_lines(rank=None)
    command = [sys.executable, "-m", "distributed_unlearn", "rounds", "run-once", str(path.absolute()), *overrides]
    passes = Passes(config, service_ledger(config), trigger, command, console)
    scheduler = BlockingScheduler(
        executors={"default": ThreadPoolExecutor(1)},  # one round at a time
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
    )

    def stop(number: int, frame: FrameType | None) -> None:
        first = not passes.ended
        passes.end()
        if first:  # a second signal finds the scheduler shutting down, and only waits with it
            scheduler.shutdown(wait=True)

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(name) is not signal.SIG_IGN:  # nohup
            signal.signal(name, stop)
    scheduler.add_job(passes.look)  # at once: what was missed or left open while no scheduler ran
    scheduler.add_job(passes.look, trigger)
    if config.schedule.watch_minutes is not None:
        scheduler.add_job(passes.look, IntervalTrigger(seconds=60 * config.schedule.watch_minutes))
    print_line(console, f"scheduled: {config.schedule.cron} ({config.schedule.timezone})")
    with _exported(job.cluster, passes):
        scheduler.start()


@contextmanager
def _exported(cluster: ClusterConfig, passes: Passes) -> Iterator[None]:
    """The queue as Ray's metrics, where the scheduler is a Ray job itself, or its job names a cluster."""
    if cluster.backend != "ray" or ray_address(cluster) is None:
        yield
        return
    from distributed_unlearn.cluster.metrics import metrics_of_scheduler

    with metrics_of_scheduler(cluster) as metrics:
        passes.tell_queue = metrics.queue
        yield
