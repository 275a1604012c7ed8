"""Log lines as JSON, each with the rank of the process that wrote it: for whatever collects the logs of many processes.

One setting turns them on, `cluster.log_format: json`, in the driver and in every worker.
"""

import json
import logging
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

PACKAGE = "distributed_unlearn"


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, logger, rank, process, message, and the event's own fields."""

    def __init__(self, rank: int | None) -> None:
        """`rank`: of a worker; None for the driver."""
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """The line. Of an exception only its type: its text may quote what must not be written."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "rank": self._rank,
            "process": record.process,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line |= {str(key): _plain(value) for key, value in fields.items()}
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def use_json_lines(rank: int | None) -> None:
    """Write the package's log of this process to stderr as JSON lines, from INFO on; a second call changes the rank."""
    logger = logging.getLogger(PACKAGE)
    for handler in list(logger.handlers):
        if isinstance(handler.formatter, JsonLines):
            logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(rank))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_event(logger: logging.Logger, event: str, **fields: float | int | str | bool | None) -> None:
    """Log something that happened, with its numbers as fields of their own; seen where JSON lines are on."""
    logger.info(event, extra={"fields": {"event": event, **fields}})
