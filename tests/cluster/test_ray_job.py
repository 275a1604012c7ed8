"""`ray job submit` to a Ray with token authentication, as jobs/README.md describes it."""

import contextlib
import http.client
import json
import os
import random
import secrets
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, Running, started

pytestmark = [
    pytest.mark.slow,
    # Three times the longest wait. The method "thread" would end this very process, before anything that it started.
    pytest.mark.timeout(4500, method="signal"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="fewer processors than workers"),
]

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    address: str
    token_file: Path
    working_dir: Path

    @property
    def credentials(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def answers(self) -> bool:
        return self.ask_once("api/jobs/", self.token_file.read_text())[0] == 200

    def submit(self, folder: Path, environment: dict[str, str], name: str, *command: str) -> Running:
        """Submit the command, wait for the end of the job."""
        options = ["--address", self.address, "--submission-id", name, "--working-dir", str(self.working_dir)]
        arguments = [RAY, "job", "submit", *options, "--", sys.executable, *command]
        with started(arguments, folder, environment) as submitted:
            submitted.wait(1500)
        return submitted

    def ask(self, path: str, token: str | None) -> tuple[int, dict[str, Any]]:
        """Status and answer; a busy head is asked again for two minutes."""
        deadline = time.monotonic() + 120
        while (found := self.ask_once(path, token))[0] == 0 and time.monotonic() < deadline:
            time.sleep(1)
        return found

    def ask_once(self, path: str, token: str | None) -> tuple[int, dict[str, Any]]:
        """Status 0: no answer."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{self.address}/{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return (error.code if error.code < 500 else 0), {}  # 5xx: not up yet, or overloaded
        except (OSError, http.client.HTTPException):
            return 0, {}


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, where the kernel gives none away meanwhile; Ray's workers use 10002 to 19999."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = list(range(20000, first_ephemeral if first_ephemeral >= 21000 else 32768))
    random.shuffle(candidates)
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in candidates:
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("", port)))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError(f"no {count} free ports")


def _start_command(ports: list[int]) -> list[str]:
    port, dashboard_port, agent_port, metrics_port, client_port = ports
    options = ["--head", "--block", "--num-cpus=2", "--num-gpus=0", "--node-ip-address=127.0.0.1", f"--port={port}"]
    options += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    options += [f"--dashboard-agent-listen-port={agent_port}", f"--metrics-export-port={metrics_port}"]
    options += [f"--ray-client-server-port={client_port}", "--disable-usage-stats"]
    return [RAY, "start", *options, f"--object-store-memory={200 * 2**20}"]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    token_file = folder / "token"
    descriptor = os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(secrets.token_hex(32))
    working_dir = folder / "working_dir"
    for name in ("distributed_unlearn", "jobs"):
        shutil.copytree(ROOT / name, working_dir / name, ignore=shutil.ignore_patterns("__pycache__"))
    deadline = time.monotonic() + 600
    for attempt in range(3):
        ports = _free_ports(5)
        found = Head(f"http://127.0.0.1:{ports[1]}", token_file, working_dir)
        variables = {**found.credentials, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        with started(_start_command(ports), folder / f"home{attempt}", variables) as running:
            try:
                running.wait_until(found.answers, max(60.0, deadline - time.monotonic()))
            except AssertionError:
                if attempt < 2 and running.process.poll() is not None:
                    continue  # a port was taken between the look and the start
                raise
            yield found
        assert running.survivors(patience_seconds=60) == []
        return


def test_the_demo_runs_as_a_job(head: Head, tmp_path):
    output = tmp_path / "demo"
    command = ("jobs/demo.py", "--short", "--output", str(output))
    submitted = head.submit(tmp_path / "client", head.credentials, "demo-1", *command)
    assert submitted.process.returncode == 0, submitted.out[-3000:] + submitted.err[-3000:]
    assert "'demo-1' succeeded" in submitted.out
    summary = json.loads((output / "summary.json").read_text())
    assert {row["name"] for row in summary["methods"]} >= {"original", "unlearned (SCureNewton)"}
    assert (output / "unlearned" / "checkpoint" / "model.safetensors").exists() and (output / "report.html").exists()
    status, details = head.ask("api/jobs/demo-1", head.token_file.read_text())
    assert (status, details["status"], details["driver_exit_code"]) == (200, "SUCCEEDED", 0)
    # The id is the idempotency key: the same request again is refused.
    again = head.submit(tmp_path / "again", head.credentials, "demo-1", *command)
    assert again.process.returncode != 0 and "already exists" in again.out + again.err


def test_a_refused_job_keeps_its_exit_code(head: Head, tmp_path):
    submitted = head.submit(tmp_path / "client", head.credentials, "refused-1", "jobs/run.py", "jobs/none.yaml")
    assert submitted.process.returncode == 1
    assert "error (configuration): got job file 'jobs/none.yaml'" in submitted.out + submitted.err
    _, details = head.ask("api/jobs/refused-1", head.token_file.read_text())
    assert (details["status"], details["driver_exit_code"]) == ("FAILED", 3)


def test_without_the_token_nothing_is_accepted(head: Head, tmp_path):
    output = tmp_path / "demo"
    submitted = head.submit(tmp_path / "client", {}, "intruder-1", "jobs/demo.py", "--output", str(output))
    assert submitted.process.returncode != 0 and "token authentication is enabled" in submitted.err
    assert not output.exists()
    assert head.ask("api/jobs/", None)[0] == 401
    assert head.ask("api/jobs/", "0" * 64)[0] == 403
    status, jobs = head.ask("api/jobs/", head.token_file.read_text())
    assert status == 200 and "intruder-1" not in json.dumps(jobs)
