"""A Ray head with dashboard and token on 127.0.0.1, for the length of a block, and a connection to it that breaks."""

import contextlib
import http.client
import json
import os
import random
import secrets
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from processes import ROOT, Running, started

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    address: str
    token_file: Path
    working_dir: Path
    session: Path
    """Where Ray keeps logs and packages."""
    metrics_port: int

    @property
    def credentials(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def files_with(self, text: bytes) -> list[str]:
        """Files of Ray itself, logs and unpacked packages among them, that hold a text."""
        found = []
        for path in self.session.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file() and text in path.read_bytes():
                    found.append(str(path))
        return found

    def metrics(self) -> str:
        """What Prometheus would read; nothing while the exporter is busy."""
        headers = {"Authorization": f"Bearer {self.token_file.read_text()}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.metrics_port}/metrics", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return str(answer.read().decode())
        except (OSError, http.client.HTTPException):
            return ""

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


@contextlib.contextmanager
def running_head(folder: Path) -> Iterator[Head]:
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
        found = Head(f"http://127.0.0.1:{ports[1]}", token_file, working_dir, folder, ports[3])
        variables = {**found.credentials, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        variables["RAY_metrics_report_interval_ms"] = "500"
        with started(_start_command(ports), folder / f"home{attempt}", variables) as running:
            try:
                running.wait_until(found.answers, max(60.0, deadline - time.monotonic()))
            except AssertionError:
                if attempt < 2 and running.process.poll() is not None:
                    continue  # a port was taken between the look and the start
                raise
            yield replace(found, session=running.scratch)
        assert running.survivors(patience_seconds=60) == []
        return


class BreakableConnection:
    """A port on 127.0.0.1 that leads to another one, and that can be cut."""

    def __init__(self, port: int) -> None:
        self._port, self._cut, self._open = port, False, set[socket.socket]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.num_accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def cut(self) -> None:
        """Break every connection, and every one that begins."""
        self._cut = True
        for end in list(self._open):
            _end(end)

    def mend(self) -> None:
        self._cut = False

    def close(self) -> None:
        self.cut()
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                if self._cut:
                    near.close()
                    continue
                self.num_accepted += 1
                far = socket.create_connection(("127.0.0.1", self._port))
                self._open.update((near, far))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        _end(source)
        _end(sink)


def _end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
