"""Outcomes sent to who forwarded the request: signed, tried a bounded number of times, at least once each.

A message is JSON (`requests.ErasureRequest.outcome_message`). Its headers: `X-Delivery`, the same number for every try
of one message; `X-Timestamp`, seconds since 1970; `X-Signature`, `sha256=` and the HMAC-SHA256 of the timestamp, a full
stop and the body. A receiver compares the signature, refuses old timestamps, and takes each delivery once.
"""

import hashlib
import hmac
import http.client
import logging
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import timedelta
from email.message import Message
from typing import IO, Any

from sqlalchemy import select, update

from distributed_unlearn.config.service import WebhookConfig
from distributed_unlearn.service.canonical import time_text
from distributed_unlearn.service.ledger import Lease, Ledger
from distributed_unlearn.service.tables import WEBHOOKS

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deliveries:
    """What one pass over the waiting messages did."""

    delivered: int
    failed: int
    """They are tried again."""
    given_up: int


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the message to an address that the operator never named."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def sign_message(secret: str, timestamp: int, body: bytes) -> str:
    """`sha256=` and HMAC-SHA256 of `timestamp.body`."""
    return "sha256=" + hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()


def deliver(ledger: Ledger, lease: Lease, config: WebhookConfig, secret: str) -> Deliveries:
    """Try every message whose time has come once.

    Raises:
        LeaseError: another scheduler has taken over; it delivers now.
    """
    with ledger.read() as connection:
        due = (WEBHOOKS.c.next_at.is_not(None)) & (WEBHOOKS.c.next_at <= time_text(ledger.clock()))
        rows = connection.execute(select(WEBHOOKS).where(due).order_by(WEBHOOKS.c.id)).all()
    delivered = failed = given_up = 0
    for row in rows:
        arrived = _post(config, secret, row.id, row.body.encode(), int(ledger.clock().timestamp()))
        attempts, next_at = row.attempts + 1, None
        if arrived:
            delivered += 1
        elif attempts >= config.attempts:
            given_up += 1
            _LOG.warning("webhook of request %d given up after %d attempts", row.request_id, attempts)
        else:
            failed += 1
            pause = timedelta(seconds=min(config.first_pause_seconds * 2 ** (attempts - 1), 86400.0))
            next_at = time_text(ledger.clock() + pause)
        with ledger.write(lease) as writing:
            values: dict[str, Any] = {"attempts": attempts, "next_at": next_at, "delivered": arrived}
            writing.connection.execute(update(WEBHOOKS).where(WEBHOOKS.c.id == row.id).values(**values))
    return Deliveries(delivered, failed, given_up)


def _post(config: WebhookConfig, secret: str, delivery: int, body: bytes, timestamp: int) -> bool:
    request = urllib.request.Request(
        config.url,
        data=body,
        headers={
            "Content-Type": "application/json",
            "X-Delivery": str(delivery),
            "X-Timestamp": str(timestamp),
            "X-Signature": sign_message(secret, timestamp, body),
        },
    )
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=config.timeout_seconds) as response:
            return 200 <= int(response.status) < 300
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and HTTPError are OSErrors
        _LOG.warning("webhook %d did not arrive (%s)", delivery, type(error).__name__)
        return False
