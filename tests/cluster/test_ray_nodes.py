"""A cluster of four nodes, jobs submitted to it over HTTP with a token; a node is killed inside a product."""

import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from processes import Running, command_line, started
from ray_head import _free_ports
from safetensors.torch import load_file
from tiny_job import TinyJob

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000, method="signal"),  # the method "thread" would leave what was started
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="fewer processors than nodes can bear"),
]
HERE = Path(__file__).parent
STEPS = 6


@dataclass(frozen=True)
class Nodes:
    folder: Path
    address: str
    token_file: Path

    @property
    def credentials(self) -> dict[str, str]:
        # Else Ray replaces 127.0.0.1 by the machine's own address, where this cluster does not listen.
        here = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file), **here}

    def kill_a_busy_one(self, submitted: Running) -> None:
        (self.folder / "kill").touch()
        submitted.wait_until((self.folder / "killed").exists, 60)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    token_file, ports = folder / "token", _free_ports(5)
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    found = Nodes(folder, f"http://127.0.0.1:{ports[0]}", token_file)
    program = [sys.executable, str(HERE / "nodes.py"), str(folder), *map(str, ports)]
    with started(program, folder / "home", found.credentials) as running:
        running.wait_until((folder / "up").exists, 600)
        yield found


def _job(tiny: TinyJob, folder: Path) -> list[str]:
    """What is the same in every run; ids in a file, so that none travels."""
    folder.mkdir()
    ids = folder / "ids.txt"
    ids.write_text("".join(f"{row['record_id']}\n" for row in tiny.rows() if row["subject_id"] == "person-0000"))
    return [
        *(str(tiny.job), f"forget={{ids_file: {ids}}}", f"output={folder / 'out'}", "objective.name=graddiff"),
        *(f"solver.max_steps={STEPS}", "save.state_every_steps=1"),
    ]


CLUSTER = "cluster={num_workers: 4, zero_stage: 3, use_gpu: never, collective_timeout_seconds: 900.0}"


def _submit(nodes: Nodes, job: list[str], folder: Path, environment: dict[str, str] | None = None):
    options = ["--address", nodes.address, "--python", sys.executable, "--follow", "--allow-incomplete"]
    options += ["--job-folder", str(folder / "jobs"), "--env", f"PYTHONPATH={HERE.parents[1]}"]
    (folder / "jobs").mkdir()
    command = command_line("submit", *job, CLUSTER, *options)
    return started(command, folder / "client", nodes.credentials if environment is None else environment)


def _update(tiny: TinyJob, folder: Path) -> np.ndarray:
    before = load_file(tiny.model / "model.safetensors")
    after = load_file(folder / "out" / "checkpoint" / "model.safetensors")
    return np.concatenate([(after[name] - before[name]).double().numpy().ravel() for name in sorted(before)])


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, tiny: TinyJob, tmp_path_factory) -> Path:
    """A round of four workers on two nodes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with _submit(nodes, _job(tiny, folder), folder) as submitted:
        assert submitted.wait(1200) == 0, submitted.out[-3000:] + submitted.err[-3000:]
        assert "restart" not in submitted.out
    return folder


def test_four_workers_on_two_nodes_move_the_weights_as_one_does(undisturbed: Path, tiny: TinyJob, tmp_path):
    folder = tmp_path / "alone"
    with started(command_line("run", *_job(tiny, folder), "--allow-incomplete"), tmp_path / "home") as alone:
        assert alone.wait(600) == 0, alone.err[-3000:]
    one, four = _update(tiny, folder), _update(tiny, undisturbed)
    # float32 sums in another order: about 1e-6 a step, and six steps build on each other.
    assert np.linalg.norm(one) > 0.01 and np.linalg.norm(one - four) <= 1e-3 * np.linalg.norm(one)


def test_a_wrong_token_is_refused(nodes: Nodes, tiny: TinyJob, tmp_path):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    folder = tmp_path / "run"
    environment = {**nodes.credentials, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    with _submit(nodes, _job(tiny, folder), folder, environment) as submitted:
        assert submitted.wait(300) not in (0, 1)
        assert submitted.err.count("error (") == 1 and "token" in submitted.err and "Traceback" not in submitted.err
    assert not (folder / "out").exists()


def test_a_worker_that_raises_or_is_stopped_ends_the_group_and_is_named(nodes: Nodes, tiny: TinyJob, tmp_path):
    program = [sys.executable, str(HERE / "nodes_failures.py"), (nodes.folder / "up").read_text(), str(tiny.model)]
    with started(program, tmp_path / "home", nodes.credentials) as running:
        assert running.wait(900) == 0, running.err[-3000:]
        found, errors = json.loads(running.out.strip().splitlines()[-1]), running.err
    raised, stopped = found["raise"], found["stop"]
    assert raised["raised"] and "worker 1, which raised an error" in raised["got"] and raised["left"] == []
    assert raised["seconds"] < 300, "the collective's timeout is 1800 s"
    # Its peer's collective and the question to it wait equally long; the error says which of the two ended first.
    assert stopped["got"].startswith(("worker 1, which does not answer", "worker 1 (process "))
    assert not stopped["raised"]
    assert f"worker 1 (process {stopped['process']} at " in errors, "named while the others still wait"
    assert stopped["left"] == [], "the stopped one too, on another node than the driver's"


def test_a_round_goes_on_after_its_node_was_killed_inside_a_product(
    nodes: Nodes, undisturbed: Path, tiny: TinyJob, tmp_path
):
    """Last: the cluster has one node less afterwards, and the place of the lost workers is taken on the third."""
    folder = tmp_path / "run"
    with _submit(nodes, _job(tiny, folder), folder) as submitted:
        submitted.wait_until((folder / "out" / "state" / "round_1_step_2").exists, 600)
        nodes.kill_a_busy_one(submitted)
        begun = time.monotonic()
        submitted.wait_until(lambda: "restart 1 of 3, on new workers, after step" in submitted.out, 300)
        assert time.monotonic() - begun < 180, "the collective's timeout is 900 s"
        assert submitted.wait(900) == 0, submitted.out[-3000:] + submitted.err[-3000:]
    record = json.loads((folder / "out" / "record.json").read_text())
    assert [step["step"] for step in record["rounds"][0]["steps"]] == list(range(STEPS))
    ours, theirs = _update(tiny, folder), _update(tiny, undisturbed)
    # The same ranks with the same shares of every batch, in another place: not a bit differs but by gloo's own order.
    assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)
