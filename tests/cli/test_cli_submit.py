"""`submit` before a job server of plain dictionaries: what travels, what is refused, and exit codes."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Outcome, assert_refused, call

from distributed_unlearn.config import load_job
from distributed_unlearn.config.submission import PATH_KEYS, fields, inline_ids
from tests.cluster.fake_job_server import FakeJobServer, fake_job_server

JOB: dict[str, Any] = {
    "model": {"path": "org/model"},
    "data": {"path": "/shared/records.jsonl"},
    "forget": {"ids_file": "/shared/ids.txt"},
    "holdout": {"path": "/shared/holdout.jsonl"},
    "output": "/shared/runs/first",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJobServer]:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    from distributed_unlearn.cluster import submit

    monkeypatch.setattr(submit, "PAUSE_SECONDS", 0.02)
    with fake_job_server(FakeJobServer()) as running:
        yield running


@pytest.fixture
def submit(server: FakeJobServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def run(*arguments: str, job: dict[str, Any] | None = JOB) -> Outcome:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # what is said wins over it
        names = []
        if job is not None:
            (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
            names = [str(tmp_path / "job.yaml")]
        return call(capsys, ["submit", *names, "--address", server.address, "--patience-seconds", "2", *arguments])

    return run


def ends(status: str, code: int | None, log: str = ""):
    def change(job: dict[str, Any]) -> None:
        job.update(status=status, driver_exit_code=code, log=log or job["log"])

    return change


def test_what_travels_is_the_job_file_alone(server, submit):
    found = submit("solver.max_steps=3", "--env", "HF_HOME=/shared/hf", "--allow-incomplete")
    assert found.code == 0, found.err
    (request,) = server.submissions
    name = request["submission_id"]
    assert found.out == f"{name}\n" and name.startswith("unlearn-")
    assert request["entrypoint"] == "exec python -m distributed_unlearn run job.yaml --allow-incomplete"
    assert request["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60", "HF_HOME": "/shared/hf"}
    (package,) = server.packages.values()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        assert archive.namelist() == ["job.yaml"]
        assert yaml.safe_load(archive.read("job.yaml")) == {**JOB, "solver": {"max_steps": 3}}


def test_the_same_job_again_is_taken_up_and_another_is_another(server, submit, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("r1\n")
    job = {**JOB, "forget": {"ids_file": str(ids)}}
    names = [submit(job=job).out, submit(job=job).out, submit("solver.max_steps=3", job=job).out]
    ids.write_text("r1\nr2\n")
    names.append(submit(job=job).out)
    assert names[0] == names[1] and len(set(names)) == 3 == len(server.submissions)


def test_an_id_says_one_job(server, submit):
    assert submit("--id", "round-1").code == 0
    assert_refused(submit("output=/shared/other", "--id", "round-1"), 12, "request", "which another job has")


def test_the_file_of_another_job_with_this_id_stays_as_it_is(server, submit, tmp_path):
    where = ("--id", "round-1", "--job-folder", str(tmp_path / "shared"))
    assert submit(*where).code == 0
    before = (tmp_path / "shared" / "round-1.yaml").read_bytes()
    assert_refused(submit("output=/shared/other", *where), 12, "request", "which another job has")
    assert (tmp_path / "shared" / "round-1.yaml").read_bytes() == before
    assert len(server.submissions) == 1


@pytest.mark.parametrize(
    ("job", "place"),
    [
        ({"forget": {"subjects": ["author-1"]}}, "forget.subjects"),
        ({"forget": {"record_ids": ["author-1"]}}, "forget.record_ids"),
        ({"holdout": {"subjects": ["author-1"]}}, "holdout.subjects"),
        ({"data": {"path": "/shared/r.jsonl", "erased": {"record_ids": ["author-1"]}}}, "data.erased.record_ids"),
        ({"forget": None, "rounds": [{"ids_file": "/shared/a"}, {"subjects": ["author-1"]}]}, "rounds.subjects"),
    ],
)
def test_ids_do_not_travel(server, submit, job, place, tmp_path):
    found = submit(job={**JOB, **job})
    assert_refused(found, 3, "configuration", place)
    assert "author-1" not in found.err and not server.submissions
    assert submit("--job-folder", str(tmp_path / "shared"), job={**JOB, **job}).code == 0
    assert "author-1" not in json.dumps(server.submissions) and not server.packages
    (where,) = (tmp_path / "shared").glob("unlearn-*.yaml")
    assert where.stat().st_mode & 0o777 == 0o600 and "author-1" in where.read_text()
    assert server.submissions[0]["entrypoint"] == f"exec python -m distributed_unlearn run {where}"


def test_ids_in_overrides_do_not_travel_and_their_digest_is_salted(server, submit, tmp_path):
    override = "forget={subjects: [author-1]}"
    assert_refused(submit(override), 3, "configuration", "forget.subjects")
    folders = [str(tmp_path / name) for name in ("one", "two")]
    names = [submit(override, "--job-folder", folder).out for folder in (*folders, folders[0])]
    assert names[0] == names[2] != names[1]  # by a salt that the folder keeps


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("output=runs/first", "output"),
        ("output=~/runs", "output"),
        ("data.path=records.jsonl", "data.path"),
        ("data.path=[/shared/a.jsonl, b.csv]", "data.path"),
        ("model.path=./checkpoint", "model.path"),
        ("model.path=runs/first/checkpoint", "model.path"),
        ("forget.ids_file=ids", "forget.ids_file"),
        ("retrained=runs/retrained/checkpoint", "retrained"),
        ("model.adapter={path: adapters/one/two}", "model.adapter.path"),
    ],
)
def test_a_relative_path_is_refused(server, submit, override, place):
    found = submit(override)
    assert_refused(found, 3, "configuration", f"a job for a cluster: {place}\n")
    assert not server.submissions


def test_names_on_the_hub_are_no_relative_paths(submit, tmp_path, monkeypatch):
    assert submit("data.path=locuslab/TOFU", "data.split=train").code == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert_refused(submit(), 3, "configuration", "model.path")  # a folder here, and no name


def test_every_path_of_a_job_is_looked_at(tmp_path):
    """A field that holds a path has one of the names that are looked at."""
    from distributed_unlearn.config import JobConfig
    from distributed_unlearn.config.base import StrictModel

    sections, pending = set[type[StrictModel]](), [JobConfig]
    while pending:
        section = pending.pop()
        sections.add(section)
        for info in section.model_fields.values():
            text = repr(info.annotation)
            pending += [c for c in _all_sections(StrictModel) if c.__name__ in text and c not in sections]
    paths = {
        (section.__name__, key)
        for section in sections
        for key, info in section.model_fields.items()
        if "_check_path" in repr(info.annotation) + repr(info.metadata)
    }
    assert len(paths) > 6 and {key for _, key in paths} <= set(PATH_KEYS)


def _all_sections(base: type) -> list[type]:
    return [found for child in base.__subclasses__() for found in (child, *_all_sections(child))]


def test_every_recipe_says_which_ids_it_names():
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    found = {path.stem: inline_ids(load_job(path, [])) for path in sorted(jobs.glob("*unlearn.yaml"))}
    assert found["smollm2_tofu_unlearn"] == ["forget.subjects", "holdout.subjects"]
    assert all("." in place for places in found.values() for place in places)
    assert ("output", "output") in {
        (place, key) for place, key, _ in fields(load_job(jobs / "digits_cnn_train.yaml", []))
    }


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 10, 10), ("FAILED", 3, 3), ("FAILED", -9, 137), ("FAILED", 1, 1)],
)
def test_the_exit_code_is_the_job_s_own(server, submit, status, code, expected):
    server.on_status = ends(status, code, "its log\n")
    found = submit("--follow")
    assert (found.code, found.out) == (expected, "its log\n")
    assert f"job {server.submissions[0]['submission_id']}: {status}, exit code {code}" in found.err


def test_a_stopped_job_is_no_success(server, submit):
    server.on_status = ends("STOPPED", None)
    assert_refused(submit("--follow"), 15, "stopped", "which was stopped")


def test_a_job_that_never_started_is_no_success(server, submit):
    server.on_status = ends("FAILED", None)
    assert_refused(submit("--follow"), 8, "worker", "failed without an exit code")


def test_another_attempt_is_made_on_demand_only(server, submit):
    server.on_status = ends("FAILED", 8)
    first = submit("--follow")
    assert submit("--follow").code == 8 and len(server.submissions) == 1
    server.on_status = lambda job: job["submission_id"].endswith("-2") and ends("SUCCEEDED", 0)(job)
    again = submit("--follow", "--retry")
    assert (first.code, again.code, len(server.submissions)) == (8, 0, 2)
    assert server.submissions[1]["submission_id"] == server.submissions[0]["submission_id"] + "-2"
    assert submit("--follow", "--retry").code == 0 and len(server.submissions) == 2  # it succeeded: taken up


@pytest.mark.parametrize("failure", ["drop after", "drop before", "status 500", "status 503"])
def test_a_lost_answer_submits_nothing_twice(server, submit, failure):
    # Version twice, the job's state, its package twice, the submission: each of them fails once.
    for number in range(2, 8):
        server.failures = ["ok"] * number + [failure]
        found = submit("--id", f"{number}")
        server.failures = []
        assert found.code in (0, 6), found.err
        assert found.code == 0 or failure == "status 500"  # the server said no
        assert [request["submission_id"] for request in server.submissions].count(f"{number}") <= 2
        assert list(server.jobs).count(f"{number}") <= 1
        assert submit("--id", f"{number}").code == 0


def test_who_comes_second_takes_the_job_up(server, submit):
    server.on_submission = server.add  # another submission of the same job, between our look and ours
    found = submit()
    assert found.code == 0 and "it is taken up, nothing was submitted" in found.err and len(server.jobs) == 1


def test_a_submission_that_is_refused_says_why(server, submit):
    server.failures = ["ok"] * 5 + ["status 400"]
    assert_refused(submit(), 6, "resources", "which the job server refuses", "400")
    assert not server.jobs


def test_a_log_is_written_once_though_the_server_falters(server, submit):
    pieces = [f"line {number}\n" for number in range(12)]

    def grow(job: dict[str, Any]) -> None:
        if pieces:
            job["log"] += pieces.pop(0)
            server.failures = [["ok"], ["drop after"], ["status 500"], ["drop before"]][len(pieces) % 4]
        else:
            ends("SUCCEEDED", 0)(job)

    server.on_status = grow
    found = submit("--follow")
    assert (found.code, found.out) == (0, "".join(f"line {number}\n" for number in range(12)))
    assert "trying again" in found.err


def test_a_connection_lost_for_good_says_how_to_go_on(server, submit):
    server.on_status = lambda job: server.failures.extend(["drop before"] * 10000)
    found = submit("--follow", "--patience-seconds", "0.3")
    assert_refused(found, 6, "resources", "for 0.3 s", "takes the job up")


def test_a_token_that_is_no_longer_taken_ends_the_following(server, submit):
    server.on_status = lambda job: setattr(server, "token", "another")
    assert_refused(submit("--follow"), 6, "resources", "no access to the job server")


def test_a_forgotten_job_is_no_success(server, submit):
    server.on_status = lambda job: server.jobs.clear() if job["log"] else job.update(log="begun\n")
    found = submit("--follow")
    assert found.out in ("begun\n", "")
    assert_refused(found, 8, "worker", "no longer knows")


def test_a_job_is_taken_up_and_stopped_by_its_id(server, submit):
    submit("--id", "one")
    assert submit("--id", "one", job=None).out == "one\n"
    found = submit("--id", "one", "--stop", job=None)
    assert found.code == 0 and "is being stopped" in found.err
    assert_refused(submit("--id", "two", job=None), 12, "request", "'two'")


@pytest.mark.parametrize(("token", "words"), [("", "Authentication required"), ("x" * 32, "Authentication failed")])
def test_without_the_token_nothing_is_submitted(server, submit, monkeypatch, token, words):
    server.token = "y" * 32
    if token:
        from distributed_unlearn.cluster import submit as module

        header = {"Authorization": f"Bearer {token}"}
        monkeypatch.setattr("ray.dashboard.modules.dashboard_sdk.get_auth_headers_if_auth_enabled", lambda own: header)
        assert module.JobServer
    assert_refused(submit(), 6, "resources", "no access to the job server", words, "RAY_AUTH_TOKEN_PATH")
    assert not server.submissions


@pytest.mark.parametrize(
    "address", ["ray://127.0.0.1:1", "127.0.0.1:8265", "auto", "http://", "http://a:b", "http://a/b"]
)
def test_an_address_that_is_none_is_refused(capsys, tmp_path, address):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    found = call(capsys, ["submit", str(tmp_path / "job.yaml"), "--address", address])
    assert_refused(found, 3, "configuration", "the job server's address")


def test_nobody_at_the_address_is_said_at_once(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    assert_refused(call(capsys, ["submit", str(tmp_path / "job.yaml")]), 3, "configuration", "no job server")
    found = call(capsys, ["submit", str(tmp_path / "job.yaml"), "--address", "http://127.0.0.1:9"])
    assert_refused(found, 6, "resources", "no answer from a job server")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--id", "a b"),
        ("--id", ".x"),
        ("--id", "one", "--retry"),
        ("--env", "A=1", "--id", "one"),
        ("job.yaml", "--stop"),
        ("job.yaml", "--env", "HF_TOKEN=abc"),
        ("job.yaml", "--env", "abc"),
        ("job.yaml", "--patience-seconds", "-1"),
        ("job.yaml", "--job-folder", "relative"),
        ("job.yaml", "cluster.address=auto"),
        ("none.yaml",),
    ],
)
def test_wrong_use_is_refused_before_anything_is_asked(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    found = call(capsys, ["submit", "--address", "http://127.0.0.1:9", *arguments])
    assert_refused(found, 3, "configuration")
    assert not (tmp_path / "relative").exists()
