"""`distributed-unlearn submit` and `ray job submit` to a Ray with token authentication, as jobs/README.md says."""

import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from processes import Running, command_line, started
from ray_head import BreakableConnection, Head, running_head
from tiny_job import FORGET, TinyJob

pytestmark = [
    pytest.mark.slow,
    # Three times the longest wait. The method "thread" would end this very process, before anything that it started.
    pytest.mark.timeout(4500, method="signal"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="fewer processors than workers"),
]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("head")) as found:
        yield found


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


def submit(head: Head, folder: Path, *arguments: str, address: str | None = None, **variables: str):
    """`distributed-unlearn submit` for the length of the block."""
    options = ["--address", address or head.address, *arguments]
    return started(command_line("submit", *options), folder, {**head.credentials, **variables})


def ended(head: Head, folder: Path, *arguments: str, **variables: str) -> Running:
    with submit(head, folder, *arguments, **variables) as running:
        running.wait(600)
    return running


def said(running: Running) -> str:
    """What the job wrote: its log without the lines that Ray puts before it."""
    ours = [line for line in running.out.splitlines(True) if "-- Runtime env" not in line]
    return "".join(line for line in ours if not line.startswith("Running entrypoint for job"))


def interpreter(path: Path, script: str) -> str:
    """What a job runs in the place of Python: the connection is tried, not the job."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


@pytest.fixture
def job(tiny: TinyJob, tmp_path: Path) -> Path:
    """A job for the cluster whose ids are in files."""
    tree = yaml.safe_load(tiny.job.read_text())
    for key in ("forget", "holdout"):
        people = tree[key].pop("subjects")
        rows = [row["record_id"] for row in tiny.rows() if row["subject_id"] in people]
        (tmp_path / f"{key}.txt").write_text("\n".join(rows) + "\n")
        tree[key] = {"ids_file": str(tmp_path / f"{key}.txt")}
    tree["cluster"] = {"num_workers": 2, "zero_stage": 3, "use_gpu": "never"}
    tree["output"] = str(tmp_path / "output")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "job.yaml"


def test_a_job_is_submitted_once_and_leaves_no_id_with_ray(head: Head, tiny: TinyJob, job: Path, tmp_path: Path):
    arguments = (str(job), "solver.max_steps=1", "--follow", "--python", sys.executable, "--ship-code")
    first = ended(head, tmp_path / "first", *arguments)
    assert first.process.returncode in (0, 10), first.out[-3000:] + first.err[-3000:]
    assert "round 1: " in first.out and "was submitted\n" in first.err
    record = (tmp_path / "output" / "record.json").read_bytes()
    again = ended(head, tmp_path / "again", *arguments)
    assert again.process.returncode == first.process.returncode and again.out == first.out
    assert "taken up, nothing was submitted" in again.err
    assert (tmp_path / "output" / "record.json").read_bytes() == record
    _, jobs = head.ask("api/jobs/", head.token_file.read_text())
    erased = [row["record_id"] for row in tiny.rows() if row["subject_id"] in FORGET]
    for name in (*FORGET, *erased):
        assert name not in json.dumps(jobs)
        assert not head.files_with(name.encode())


EXPORTED = {"alpha", "gamma", "residual", "products_per_second", "products_total", "phase_seconds_total"}


def test_prometheus_reads_the_steps_and_every_worker_logs_its_rank(head: Head, job: Path, tmp_path: Path):
    settings = ("solver.max_steps=200", "cluster.log_format=json", f"output={tmp_path}/measured")
    found: dict[str, float] = {}

    def read() -> bool:
        for line in head.metrics().splitlines():
            if line.startswith("ray_distributed_unlearn_"):
                found[line.partition("{")[0].removeprefix("ray_distributed_unlearn_")] = float(line.split()[-1])
        return set(found) >= EXPORTED

    arguments = (str(job), *settings, "--id", "measured-1", "--follow", "--python", sys.executable, "--ship-code")
    with submit(head, tmp_path / "client", *arguments) as running:
        running.wait_until(lambda: read() and '"event": "step"' in running.out, 600)
        running.process.send_signal(signal.SIGINT)
        running.wait(60)
    assert ended(head, tmp_path / "stop", "--id", "measured-1", "--stop").process.returncode == 0
    assert found["alpha"] > 0 and found["products_per_second"] > 0 and found["products_total"] >= 2
    lines = [line for path in head.session.rglob("worker-*.err") for line in path.read_text().splitlines()]
    calls = [json.loads(line) for line in lines if line.startswith('{"time"')]
    assert {call["rank"] for call in calls if call["event"] == "call"} == {0, 1}
    driver = [json.loads(line) for line in running.out.splitlines() if line.startswith('{"time"')]
    steps = [line for line in driver if line["event"] == "step"]
    assert steps[0]["step"] == 1 and steps[0]["rank"] is None and steps[0]["alpha"] > 0


def test_ids_in_a_job_file_stay_in_the_shared_folder(head: Head, tiny: TinyJob, tmp_path: Path):
    python, shared = interpreter(tmp_path / "python", 'echo "$4"; exit 14'), tmp_path / "shared"
    where = ("--python", python, "--job-folder", str(shared), "--follow")
    settings = ("cluster={num_workers: 1}", f"output={tmp_path}/output")
    found = ended(head, tmp_path / "client", str(tiny.job), *settings, *where)
    assert found.process.returncode == 14, found.err  # the job's own
    path = Path(said(found).strip())
    assert path.parent == shared and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert yaml.safe_load(path.read_text())["forget"]["subjects"] == list(FORGET)
    assert not head.files_with(FORGET[0].encode())


def test_a_log_is_written_once_over_connections_that_break(head: Head, job: Path, tmp_path: Path):
    count = 'i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo "line $i"; sleep 0.2; done; exit 3'
    connection = BreakableConnection(int(head.address.rpartition(":")[2]))
    arguments = (str(job), "--id", "broken-1", "--follow", "--python", interpreter(tmp_path / "python", count))
    with submit(head, tmp_path / "client", *arguments, address=connection.address) as running:
        running.wait_until(lambda: "line 5\n" in running.out, 300)
        connection.cut()
        running.wait_until(lambda: "trying again" in running.err, 60)
        connection.mend()
        running.wait(300)
    connection.close()
    assert running.process.returncode == 3
    assert said(running) == "".join(f"line {number + 1}\n" for number in range(60))
    assert "the connection was lost" in running.err


def test_who_follows_may_leave_and_take_the_job_up_again(head: Head, job: Path, tmp_path: Path):
    slow = f"trap 'echo ended; exit 143' TERM; echo begun; while [ ! -e {tmp_path}/go ]; do sleep 0.2; done; echo done"
    arguments = (str(job), "--id", "left-1", "--python", interpreter(tmp_path / "python", slow))
    with submit(head, tmp_path / "one", *arguments, "--follow") as running:
        running.wait_until(lambda: "begun" in running.out, 300)
        running.process.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    assert "the job goes on" in running.err
    other = ended(head, tmp_path / "other", str(job), "solver.max_steps=1", "--id", "left-1")
    assert other.process.returncode == 12 and "which another job has" in other.err
    (tmp_path / "go").touch()
    taken = ended(head, tmp_path / "two", "--id", "left-1", "--follow")
    assert (taken.process.returncode, said(taken)) == (0, "begun\ndone\n")


def test_a_stopped_job_is_no_success_and_can_be_tried_again(head: Head, job: Path, tmp_path: Path):
    slow = "trap 'sleep 5; echo in order; exit 143' TERM; echo begun; sleep 600 & wait"
    script = f"[ -e {tmp_path}/again ] && exit 0; {slow}"
    arguments = (str(job), "--id", "stopped-1", "--follow", "--python", interpreter(tmp_path / "python", script))
    with submit(head, tmp_path / "one", *arguments) as running:
        running.wait_until(lambda: "begun" in running.out, 300)
        assert ended(head, tmp_path / "stop", "--id", "stopped-1", "--stop").process.returncode == 0
        assert running.wait(300) == 15
    assert said(running) == "begun\nin order\n"  # five seconds after SIGTERM, where Ray's own patience is three
    assert "error (stopped): got job 'stopped-1'" in running.err
    (tmp_path / "again").touch()
    assert ended(head, tmp_path / "two", *arguments).process.returncode == 15
    third = ended(head, tmp_path / "three", *arguments, "--retry")
    assert third.process.returncode == 0 and "job stopped-1-2: SUCCEEDED" in third.err


def test_a_wrong_token_is_refused(head: Head, job: Path, tmp_path: Path):
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    for name, variables in (("wrong", {"RAY_AUTH_TOKEN_PATH": str(wrong)}), ("none", {"RAY_AUTH_MODE": "disabled"})):
        found = ended(head, tmp_path / f"home-{name}", str(job), "--id", f"intruder-{name}", **variables)
        assert found.process.returncode == 6
        assert found.err.count("error (resources): got no access to the job server at") == 1
        assert "Traceback" not in found.err
        assert head.ask(f"api/jobs/intruder-{name}", head.token_file.read_text())[0] == 404
