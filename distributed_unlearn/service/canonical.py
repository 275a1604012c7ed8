"""One spelling for everything that is hashed: JSON with sorted keys and no spaces; times in UTC, all of one width."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from distributed_unlearn.errors import RequestError

_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, ASCII only; NaN and infinity are refused (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def utc_now() -> datetime:
    """The machine's clock, in UTC."""
    return datetime.now(UTC)


def time_text(time: datetime) -> str:
    """`2026-01-31T23:59:59.000000Z`: as text, times sort as they follow each other."""
    assert time.tzinfo is not None, "a time without a zone"
    return time.astimezone(UTC).strftime(_TIME_FORMAT)


def parse_time(text: str) -> datetime:
    """The inverse of `time_text`."""
    return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)


def read_date(text: str, what: str) -> datetime:
    """A date or time that a person wrote, ISO 8601; a date alone is its last second, no zone means UTC.

    Raises:
        RequestError: no such date.
    """
    try:
        time = datetime.fromisoformat(text)
        if len(text) <= len("2026-01-31"):
            time += timedelta(days=1, seconds=-1)
        return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise RequestError(f"{what} that is no date", "ISO 8601, e.g. 2026-01-31", f"correct {what}") from None
