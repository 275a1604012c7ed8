"""Jobs on a cluster by its job server: submitted once under an id, and followed over connections that break.

Ray runs a job once and keeps its state as long as its head lives. A connection may be lost at any moment, also between
a submission and its answer: so every submission has an id, and whoever is unsure looks for it and submits again.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from distributed_unlearn.errors import ConfigError, ResourceError, WorkerError

RAY_LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""The last two set a level of their own, at which they tell of every package."""
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
REQUEST_SECONDS = 60.0
"""For one answer; a head that places workers may take half of it."""
QUIET_SECONDS = 15.0
"""A log that is silent for so long is asked whether its job still runs: a dead connection is silent, too."""
PAUSE_SECONDS = 2.0
STOP_SECONDS = 60
"""Between a job's SIGTERM and its SIGKILL; Ray's own 3 s are too short to end workers and remove half a checkpoint."""
_LOST = (OSError, aiohttp.ClientError, TimeoutError)  # `requests` derives its errors from OSError
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Work:
    """What a job runs, and what travels with it."""

    entrypoint: str
    """A line of shell."""
    digest: str
    """Of everything that the job does; kept by the server, and compared where an id comes again."""
    package: Path | None = None
    """A folder that becomes the job's working folder."""
    modules: tuple[Path, ...] = ()
    """Folders of Python packages that the job imports before any that are installed."""
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True)
class JobState:
    """How a job stands."""

    name: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED."""
    exit_code: int | None
    """Of the command; negative: the signal that ended it. None: it has not ended, or was never started."""
    digest: str | None
    message: str

    @property
    def ended(self) -> bool:
        """Whether it will never change again."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class _Client(JobSubmissionClient):
    """Ray's client, which waits for an answer for ever, with a limit."""

    def _do_request(  # type: ignore[override]  # further keywords, which nothing here gives
        self, method: str, endpoint: str, *, data: bytes | None = None, json_data: dict[str, Any] | None = None
    ) -> requests.Response:
        answer: requests.Response = super()._do_request(
            method, endpoint, data=data, json_data=json_data, timeout=REQUEST_SECONDS
        )
        return answer


class _Log:
    """A log that arrives in pieces, from its beginning again after every break; written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._written, self._position = write, 0, 0

    def begin(self) -> None:
        """What comes next is the log's beginning."""
        self._position = 0

    def add(self, text: str) -> None:
        """The next piece."""
        self._position += len(text)
        new = self._position - self._written
        if new > 0:
            self._written = self._position
            self._write(text[-new:])


class JobServer:
    """The job server of a Ray cluster.

    Raises:
        ConfigError: no such address can be.
        ResourceError: nobody answers there, it is no job server, or the token is missing or wrong.
    """

    def __init__(self, address: str, patience_seconds: float, tell: Callable[[str], None]) -> None:
        """Connect.

        Args:
            address: http:// or https:// and host:port.
            patience_seconds: For how long an established connection may be lost.
            tell: Is told of lost connections and of states.
        """
        self._address, self._patience, self._tell = _checked(address), patience_seconds, tell
        for logger in RAY_LOGGERS:  # as in a session of ours: packages are no news to the user
            logging.getLogger(logger).setLevel(logging.ERROR)
        os.environ[ADDRESS_VARIABLE] = self._address  # Ray lets the variable win over the argument
        try:
            self._client = _Client(self._address)
        except AuthenticationError as error:
            raise self._refused(error) from error
        except Exception as error:  # of any type: Ray raises RuntimeError and others for what is no job server
            raise ResourceError(
                f"no answer from a job server at '{self._address}' ({_first_line(error)})",
                "the dashboard of a running Ray cluster",
                "check --address, and the forwarding of its port (`ray dashboard cluster.yaml`); then try again",
            ) from error

    def find(self, name: str) -> JobState | None:
        """How a job stands; None: the server knows none of this name."""
        return self._patiently(lambda: self._look(name))

    def submit(self, name: str, work: Work) -> bool:
        """Submit a job unless its name is taken; True: it was submitted now.

        Raises:
            ResourceError: the server refuses the job.
        """
        return self._patiently(lambda: self._submit(name, work))

    def stop(self, name: str) -> bool:
        """Ask a job to end, as SIGTERM would; False: it had ended."""
        return bool(self._patiently(lambda: _asked(lambda: self._client.stop_job(name))))

    def follow(self, name: str, write: Callable[[str], None]) -> JobState:
        """Write a job's whole log as it grows, until its end; no part twice, whatever the connection does.

        Raises:
            ResourceError: the connection was lost for longer than `patience_seconds`; the job goes on.
            WorkerError: the server has forgotten the job, which ended with the head that ran it.
        """
        log, shown, lost = _Log(write), "", False
        while True:
            try:
                asyncio.run(self._tail(name, log))
                lost = False
            except AuthenticationError as error:
                raise self._refused(error) from error
            except _LOST as error:
                if not lost:  # else again and again, where websockets do not get through
                    self._tell(f"the connection was lost ({_first_line(error)}); asking for the log again and again")
                lost = True
            state, text = self._patiently(lambda: self._catch_up(name))
            if state is None:
                raise WorkerError(
                    f"job '{name}', which the cluster no longer knows",
                    "a head that lives as long as its jobs",
                    "look whether its output is complete; else submit it again (with resume: true it goes on)",
                )
            log.begin()
            log.add(text)
            if state.ended:
                return state
            if state.status != shown:
                self._tell(f"job {name} is {state.status}")
                shown = state.status
            time.sleep(PAUSE_SECONDS)

    async def _tail(self, name: str, log: _Log) -> None:
        """Write the log while it grows and the server answers; returns when either is over."""
        log.begin()
        tailed: Any = self._client.tail_job_logs(name)  # a generator, which Ray declares as an iterator
        async with aclosing(tailed) as pieces:
            while True:
                piece = asyncio.ensure_future(anext(pieces, None))
                try:
                    while not (await asyncio.wait({piece}, timeout=QUIET_SECONDS))[0]:
                        state = self._look(name)
                        if state is None or state.status != "RUNNING":
                            return
                    text = await piece
                except RuntimeError as error:  # Ray's own, for a connection that was closed
                    raise ConnectionError(_first_line(error)) from error
                finally:
                    piece.cancel()
                    await asyncio.gather(piece, return_exceptions=True)
                if text is None:
                    return
                log.add(text)

    def _catch_up(self, name: str) -> tuple[JobState | None, str]:
        """The state, and then the log: of a job that has ended the whole of it."""
        state = self._look(name)
        return state, "" if state is None else (_asked(lambda: self._client.get_job_logs(name)) or "")

    def _look(self, name: str) -> JobState | None:
        found = _asked(lambda: self._client.get_job_info(name))
        if found is None:
            return None
        digest = (found.metadata or {}).get("digest")
        return JobState(name, str(found.status.value), found.driver_exit_code, digest, found.message or "")

    def _submit(self, name: str, work: Work) -> bool:
        if self._look(name) is not None:
            return False
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **(work.environment or {})}
        runtime: dict[str, Any] = {"env_vars": environment}
        if work.package is not None:
            runtime["working_dir"] = str(work.package)
        if work.modules:
            runtime["py_modules"] = [str(folder) for folder in work.modules]
            runtime["excludes"] = ["**/__pycache__/"]
        try:
            self._client.submit_job(
                entrypoint=work.entrypoint, submission_id=name, runtime_env=runtime, metadata={"digest": work.digest}
            )
        except RuntimeError as error:
            if self._look(name) is not None:
                return False  # submitted in the meantime: by somebody else, or by us and the answer was lost
            if re.search("status code 50[1-9]", str(error)):
                raise ConnectionError(_line(error, -1)) from error  # no answer of the job server's own
            raise ResourceError(
                f"job '{name}', which the job server refuses ({_line(error, -1)})",
                "a submission that the cluster takes",
                "see the dashboard's log on the head",
            ) from error
        return True

    def _patiently(self, action: Callable[[], _Answer]) -> _Answer:
        """Carry out an action that may be repeated, until the server answers or patience ends."""
        deadline, told = time.monotonic() + self._patience, False
        while True:
            try:
                return action()
            except AuthenticationError as error:
                raise self._refused(error) from error
            except _LOST as error:
                if time.monotonic() >= deadline:
                    raise ResourceError(
                        f"no answer from the job server at '{self._address}' for {self._patience:g} s "
                        f"({_first_line(error)})",
                        "a connection to the cluster; a job that was submitted goes on without it",
                        "mend the connection and give the same command again: it takes the job up",
                    ) from error
                if not told:
                    self._tell(f"no answer from {self._address} ({_first_line(error)}); trying again")
                    told = True
            time.sleep(min(PAUSE_SECONDS, max(0.0, deadline - time.monotonic())))

    def _refused(self, error: AuthenticationError) -> ResourceError:
        return ResourceError(
            f"no access to the job server at '{self._address}' ({_first_line(error)})",
            "the cluster's token, in token mode",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE, where FILE (mode 0600) holds the token of its nodes",
        )


def _checked(address: str) -> str:
    """The address without a path.

    Raises:
        ConfigError: it is none of a web server.
    """
    try:
        parts = urlsplit(address)
        fit = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        fit = False
    if not fit or parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise ConfigError(
            f"the job server's address '{address}'",
            "http://HOST:8265, the address of the cluster's dashboard",
            f"correct --address or the environment's {ADDRESS_VARIABLE}; host:6379 is for drivers",
        )
    return f"{parts.scheme}://{parts.netloc}"


def _asked(question: Callable[[], _Answer]) -> _Answer | None:
    """The server's answer; None: it knows no such job.

    Raises:
        ConnectionError: any other status, which a server gives that is overloaded, starting or ending.
    """
    try:
        return question()
    except RuntimeError as error:  # Ray's own, for every status but 200
        if "status code 404" in str(error):
            return None
        raise ConnectionError(_line(error, -1)) from error


def _first_line(error: BaseException) -> str:
    return _line(error, 0)


def _line(error: BaseException, index: int) -> str:
    """One line of an error's text, without addresses in memory."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[index]
    return re.sub(r"<[^>]*object at 0x[0-9a-f]+>(: )?", "", text)[:300]
