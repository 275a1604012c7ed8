"""A job server of a dictionary: the few answers of Ray's that a submission needs, and failures where a test wants."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeJobServer:
    """Jobs by submission id; without websockets, so that logs are asked for."""

    token: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    submissions: list[dict[str, Any]] = field(default_factory=list)
    on_status: Callable[[dict[str, Any]], None] = lambda job: None
    """Called with a job before its state is told."""
    on_submission: Callable[[dict[str, Any]], None] = lambda request: None
    """Called with a submission before it is carried out."""
    failures: list[str] = field(default_factory=list)
    """For each coming request how it fails: `status 503`, `drop before` or `drop after` it is carried out, or `ok`."""
    address: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        parts = path.strip("/").split("/")
        if parts == ["api", "version"]:
            return 200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "0", "session_name": "session"}
        if parts[:2] == ["api", "packages"]:
            if method == "PUT":
                self.packages[parts[-1]] = body
            return (200 if parts[-1] in self.packages else 404), {}
        if method == "POST" and parts == ["api", "jobs"]:
            return self._submit(json.loads(body))
        job = self.jobs.get(parts[2])
        if job is None:
            return 404, "no such job"
        if parts[3:] == ["logs"]:
            return 200, {"logs": job["log"]}
        if parts[3:] == ["stop"]:
            return 200, {"stopped": job["status"] == "RUNNING"}
        if parts[3:]:
            return 404, "no websockets here"
        self.on_status(job)
        return 200, {key: value for key, value in job.items() if key != "log"}

    def _submit(self, request: dict[str, Any]) -> tuple[int, Any]:
        self.submissions.append(request)
        self.on_submission(request)
        name = request["submission_id"]
        if name in self.jobs:
            return 500, f"Traceback (most recent call last):\nValueError: Job with submission_id {name} already exists."
        return self.add(request)

    def add(self, request: dict[str, Any]) -> tuple[int, Any]:
        """A job that runs."""
        name = request["submission_id"]
        about = {"type": "SUBMISSION", "submission_id": name, "entrypoint": request["entrypoint"]}
        self.jobs[name] = {**about, "status": "RUNNING", "metadata": request["metadata"], "log": "", "message": ""}
        return 200, {"job_id": name, "submission_id": name}


@contextlib.contextmanager
def fake_job_server(server: FakeJobServer) -> Iterator[FakeJobServer]:
    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            failure = server.failures.pop(0) if server.failures else "ok"
            if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
                found = (403 if "Authorization" in self.headers else 401), "token"
            elif failure.startswith("status"):
                found = int(failure.split()[1]), "overloaded"
            elif failure == "drop before":
                return
            else:
                found = server.answer(self.command, self.path, body)
                if failure == "drop after":
                    return
            text = json.dumps(found[1]).encode() if not isinstance(found[1], str) else found[1].encode()
            self.send_response(found[0])
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _handle  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server.address = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
