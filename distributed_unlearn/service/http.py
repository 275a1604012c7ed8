"""The HTTP endpoint for systems that forward requests: add, look at, revoke. The operator's part stays on the shell.

A token is needed for everything but the OpenAPI page; it is looked at before a body is read.
"""

import hmac
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime, BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from distributed_unlearn.config.service import RequestsConfig, ServiceConfig
from distributed_unlearn.errors import ConfigError, LedgerError, UserError
from distributed_unlearn.service.ledger import Ledger, service_ledger
from distributed_unlearn.service.requests import (
    ConflictError,
    DuePolicy,
    ErasureRequest,
    NewRequest,
    UnknownRequestError,
    add_request,
    find_request,
    get_request,
    withdraw,
)
from distributed_unlearn.service.secrets_file import read_secret
from distributed_unlearn.service.states import Outcome, PublicStatus, Reason, RequestState, TransitionError
from distributed_unlearn.version import __version__

_LOG = logging.getLogger(__name__)
MAX_BODY_BYTES = 8 * 2**20
_OPEN_PATHS = ("/docs", "/openapi.json")
_STATUS_OF: tuple[tuple[type[UserError], int], ...] = (
    (UnknownRequestError, 404),
    (ConflictError, 409),
    (TransitionError, 409),
    (LedgerError, 503),
)


class NewRequestBody(BaseModel):
    """A request for erasure."""

    model_config = ConfigDict(extra="forbid", strict=False)

    subjects: tuple[str, ...] = ()
    record_ids: tuple[str, ...] = ()
    external_id: str | None = None
    policy: DuePolicy = "default"
    due: AwareDatetime | None = None


class RequestView(BaseModel):
    """How a request stands; the ids that it names are not repeated."""

    number: int
    external_id: str | None
    status: PublicStatus
    outcome: Outcome | None
    reason: Reason | None
    received_at: datetime
    due_at: datetime
    overdue: bool
    duplicate_of: int | None
    round: int | None
    num_ids: int


def _view(request: ErasureRequest) -> RequestView:
    return RequestView(
        number=request.number,
        external_id=request.external_id,
        status=request.status,
        outcome=request.outcome,
        reason=request.reason,
        received_at=request.received_at,
        due_at=request.due_at,
        overdue=request.overdue,
        duplicate_of=request.duplicate_of,
        round=request.round_number,
        num_ids=request.num_ids,
    )


def make_app(ledger: Ledger, policy: RequestsConfig, token: str, webhook: bool) -> FastAPI:
    """The application.

    Args:
        ledger: Where requests go.
        policy: Due dates and delay.
        token: What a caller must send as `Authorization: Bearer TOKEN`.
        webhook: Whether outcomes are sent by webhook.
    """
    app = FastAPI(title="distributed-unlearn: erasure requests", version=__version__, redoc_url=None)
    _guard(app, token)
    _answer_errors(app)

    @app.post("/requests", status_code=201, summary="Take a request in; 200 if its external id is known already")
    def add(body: NewRequestBody, response: Response) -> RequestView:
        new = NewRequest(body.subjects, body.record_ids, body.external_id, body.policy, body.due)
        known = None if body.external_id is None else find_request(ledger, body.external_id)
        found = add_request(ledger, new, policy, webhook)
        if known is not None:
            response.status_code = 200
        return _view(found)

    @app.get("/requests", summary="The request of an external id")
    def find(external_id: Annotated[str, Query()]) -> RequestView:
        found = find_request(ledger, external_id)
        if found is None:
            raise UnknownRequestError("an external id that no request has", "a known external id", "add the request")
        return _view(found)

    @app.get("/requests/{number}", summary="How a request stands")
    def show(number: int) -> RequestView:
        return _view(get_request(ledger, number))

    @app.post("/requests/{number}/revoke", summary="The subject withdraws a request that no round has taken yet")
    def revoke(number: int) -> RequestView:
        return _view(withdraw(ledger, number, Reason.WITHDRAWN, RequestState.REVOKED))

    return app


def _problem(status: int, kind: str, got: str, expected: str, remedy: str) -> JSONResponse:
    return JSONResponse({"error": kind, "got": got, "expected": expected, "remedy": remedy}, status)


def _guard(app: FastAPI, token: str) -> None:
    wanted = f"Bearer {token}".encode()

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.url.path not in _OPEN_PATHS:
            given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, wanted):
                return _problem(401, "token", "no valid token", "Authorization: Bearer TOKEN", "send the right token")
        if request.method == "POST" and not request.url.path.endswith("/revoke"):
            length = request.headers.get("content-length", "")
            if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
                expected = f"a Content-Length of at most {MAX_BODY_BYTES}"
                return _problem(413, "request", "a body too large, or of unknown length", expected, "split the request")
        return await call(request)


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(UserError)
    def refused(request: Request, error: UserError) -> JSONResponse:
        status = next((status for kind, status in _STATUS_OF if isinstance(error, kind)), 422)
        if isinstance(error, LedgerError):
            _LOG.error("%s", error)  # where the ledger is, is the operator's concern alone
            return _problem(status, error.kind, "a ledger that does not answer", "a working service", "try again later")
        return _problem(status, error.kind, error.got, error.expected, error.remedy)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without the input, which FastAPI would send back and log; the name of an unknown key is input, too.
        places = [item["loc"][:-1] if item["type"] == "extra_forbidden" else item["loc"] for item in error.errors()]
        found = zip(places, error.errors(), strict=True)
        complaints = [f"{'.'.join(map(str, place))}: {item['msg']}" for place, item in found]
        return _problem(422, "request", " | ".join(complaints), "a request as /docs describes it", "correct it")

    @app.exception_handler(HTTPException)
    def unfit(request: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, "request", error.detail, "a request as /docs describes it", "correct it")


def serve(config: ServiceConfig) -> None:
    """Serve until a signal ends it; the ledger is made where there is none.

    Raises:
        ConfigError: no `http` section, or no fit token.
        LedgerError: the ledger cannot be opened.
    """
    if config.http is None:
        raise ConfigError("a service file without `http`", "http: {token_file: ...}", "add the section")
    token = read_secret(config.http.token_file, "http.token_file")
    app = make_app(service_ledger(config), config.requests, token, config.webhook is not None)
    if config.http.host not in ("127.0.0.1", "::1", "localhost"):
        _LOG.warning("listening on %s without TLS: put a proxy that speaks TLS in front", config.http.host)
    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    uvicorn.run(app, host=config.http.host, port=config.http.port, **settings)
