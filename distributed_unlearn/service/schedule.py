"""When a round begins by itself: at the ticks of a cron expression in a named time zone, or when a due date presses.

A tick is named after its time in UTC. The pass that takes it notes it in the audit trail, under the lease, so that no
tick is taken twice, whatever restarts. Missed ticks are coalesced: after a pause the last of them is taken, once.
"""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from apscheduler.triggers.cron import CronTrigger
from sqlalchemy import Connection, select

from distributed_unlearn.config.service import ScheduleConfig, ServiceConfig
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.service.canonical import parse_time
from distributed_unlearn.service.ledger import Lease, Ledger
from distributed_unlearn.service.requests import list_requests
from distributed_unlearn.service.rounds_book import RoundState, list_rounds, open_round
from distributed_unlearn.service.states import RequestState
from distributed_unlearn.service.tables import AUDIT, LEDGER

_NAME = "%Y%m%dT%H%M%SZ"
_MOST_MISSED = 100_000
"""Ticks that are counted after a pause: more than a year of one every five minutes."""


@dataclass(frozen=True)
class Due:
    """A pass that should begin now."""

    why: str
    tick: str | None
    """The tick that it takes; None where it begins between ticks."""
    runs: bool = True
    """False: the tick passes with too few requests, and is only noted."""


def cron_trigger(config: ScheduleConfig) -> CronTrigger:
    """The ticks of a schedule.

    Raises:
        ConfigError: no cron expression of five fields.
    """
    try:
        return CronTrigger.from_crontab(config.cron, timezone=ZoneInfo(config.timezone))
    except ValueError as error:
        raise ConfigError(
            f"schedule.cron that cannot be read ({error})",
            "minute, hour, day of month, month, day of week (mon to sun), e.g. '0 3 * * mon'",
            "correct the expression",
        ) from error


def tick_name(tick: datetime) -> str:
    """The name of a tick, also a Ray job's submission id where a tick is submitted as one."""
    return tick.astimezone(UTC).strftime(_NAME)


def parse_tick(name: str) -> datetime:
    """The inverse of `tick_name`.

    Raises:
        ConfigError: no such name.
    """
    try:
        if re.fullmatch(r"\d{8}T\d{6}Z", name):
            return datetime.strptime(name, _NAME).replace(tzinfo=UTC)
    except ValueError:
        pass
    raise ConfigError("a tick that is no time", "YYYYMMDDTHHMMSSZ", "use the tick as `rounds schedule` names it")


def next_tick(trigger: CronTrigger, after: datetime) -> datetime | None:
    """The first tick after a time; None where there is none."""
    found: datetime | None = trigger.get_next_fire_time(None, after + timedelta(microseconds=1))
    return None if found is None else found.astimezone(UTC)


def latest_tick(trigger: CronTrigger, after: datetime, now: datetime) -> datetime | None:
    """The last tick after `after` and not after `now`."""
    latest, tick = None, next_tick(trigger, after)
    for _ in range(_MOST_MISSED):
        if tick is None or tick > now:
            break
        latest, tick = tick, next_tick(trigger, tick)
    return latest


def last_taken(ledger: Ledger) -> datetime:
    """The last tick that was taken; before the first, when the ledger was made."""
    with ledger.read() as connection:
        created = parse_time(connection.execute(select(LEDGER.c.created_at)).scalar_one())
        return _last_taken(connection) or created


def _last_taken(connection: Connection) -> datetime | None:
    query = select(AUDIT.c.body).where(AUDIT.c.event == "tick_taken").order_by(AUDIT.c.seq.desc()).limit(1)
    body = connection.execute(query).scalar_one_or_none()
    return None if body is None else parse_tick(json.loads(body)["tick"])


def take_tick(ledger: Ledger, lease: Lease, name: str) -> bool:
    """Note a tick; False where it, or a later one, was taken before."""
    tick = parse_tick(name)
    with ledger.write(lease) as writing:
        last = _last_taken(writing.connection)
        if last is not None and tick <= last:
            return False
        writing.append("tick_taken", {"tick": name})
        return True


def find_due(ledger: Ledger, config: ServiceConfig, trigger: CronTrigger) -> Due | None:
    """Whether a pass should begin now.

    A round that was left open is gone on with at once. A tick runs a round if enough requests are ripe, or one of them
    is due soon. Between ticks a request that is due soon begins a round, unless one was rolled back since the last
    tick: trying again at once would fail again.
    """
    now = ledger.clock()
    taken = last_taken(ledger)
    tick = latest_tick(trigger, taken, now)
    name = None if tick is None else tick_name(tick)
    if open_round(ledger) is not None:
        return Due("a round was left open", name)
    ripe = [
        request
        for request in list_requests(ledger, [RequestState.RECEIVED, RequestState.SCHEDULED])
        if request.not_before <= now
    ]
    soon = now + timedelta(days=config.requests.warn_days)
    pressing = [request.number for request in ripe if request.due_at <= soon]
    if tick is not None:
        enough = len(ripe) >= config.schedule.min_requests or bool(pressing)
        return Due(f"tick, {len(ripe)} request(s) ripe", name, runs=enough)
    failed = any(entry.state == RoundState.ROLLED_BACK and entry.started_at >= taken for entry in list_rounds(ledger))
    if pressing and not failed:
        return Due(f"request {pressing[0]} is due soon", None)
    return None
