"""The output folder: one run at a time, seen by every rank, and refused early where nothing can be written."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from command_line import assert_refused, call, succeed
from tiny_job import TinyJob

from distributed_unlearn.errors import ConfigError
from distributed_unlearn.rounds.folder import LOCK_NAME, claimed, output_folder

pytestmark = pytest.mark.usefixtures("quick")

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "train={epochs: 1, batch_size: 6, zero_stage: 2}"
both = pytest.mark.parametrize("train", [(), (TRAIN,)], ids=["unlearn", "train"])


@pytest.fixture
def no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a worker was started")

    for module in ("commands.run", "demo.run"):
        monkeypatch.setattr(f"distributed_unlearn.{module}.open_group", refuse)


def _demo(output: Path | str, *options: str) -> list[str]:
    return ["demo", "--short", "--output", str(output), *options]


@both
def test_one_run_at_a_time(train, no_group, tiny: TinyJob, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    with claimed(output):
        for arguments in (tiny.run(output, *train), _demo(output)):
            outcome = call(capsys, arguments)
            assert_refused(outcome, 3, "configuration", str(output), f"process {os.getpid()} on ", "is running")
    assert list(output.iterdir()) == []


def test_a_folder_is_claimed_from_the_first_step_to_the_record(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    from distributed_unlearn.commands import run
    from distributed_unlearn.rounds import unlearning

    seen = []
    for module, name in ((run, "prepare_run"), (unlearning, "write_record"), (run, "write_report")):
        original = getattr(module, name)

        def watch(*arguments: object, name: str = name, original=original):
            seen.append((name, (tmp_path / "out" / LOCK_NAME).exists()))
            return original(*arguments)

        monkeypatch.setattr(module, name, watch)
    succeed(capsys, tiny.run(tmp_path / "out", "solver.max_steps=1"))
    assert seen == [("prepare_run", True), ("write_record", True), ("write_report", True)]
    assert not (tmp_path / "out" / LOCK_NAME).exists()


def test_the_claim_of_a_killed_run_ends_with_it(tmp_path):
    program = f"""
        import time
        from pathlib import Path
        from distributed_unlearn.rounds.folder import claimed
        with claimed(Path({str(tmp_path)!r}) / "new" / "out"):
            print("claimed", flush=True)
            time.sleep(60)
    """
    output = tmp_path / "new" / "out"
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "claimed\n"
        with pytest.raises(ConfigError, match=f"process {process.pid} on "), claimed(output):
            raise AssertionError("two runs in one folder")
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    finally:
        process.kill()
        process.wait()
    with claimed(output):
        assert (output / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")
    assert list(output.iterdir()) == []


def test_only_folders_that_were_made_and_stayed_empty_are_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    with claimed(tmp_path / "mine" / "a" / "b"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []
    with claimed(tmp_path / "mine"):
        pass
    with claimed(tmp_path / "other"):
        (tmp_path / "other" / "kept").write_text("")
    assert (tmp_path / "mine").is_dir() and [path.name for path in (tmp_path / "other").iterdir()] == ["kept"]


@both
def test_an_output_that_a_rank_does_not_see_is_refused(train, tiny: TinyJob, tmp_path, capsys, monkeypatch):
    asked = []

    def blind(self: object, path: str, token: str) -> bool:
        asked.append(Path(path).read_text() == token)
        return False

    monkeypatch.setattr("distributed_unlearn.engine.worker.Worker.can_see", blind, raising=False)
    outcome = call(capsys, tiny.run(tmp_path / "out", *train))
    assert_refused(outcome, 3, "configuration", "rank(s) 0 of 1 do not see", "storage that all nodes share")
    assert asked == [True] and not (tmp_path / "out").exists()


@both
def test_a_ray_job_needs_an_absolute_output(train, no_group, tiny: TinyJob, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    monkeypatch.chdir(tmp_path)
    _, *arguments = tiny.run(Path("runs/out"), *train)
    for command in (["run", *arguments], ["plan", *arguments], _demo("runs/out")):
        assert_refused(call(capsys, command), 3, "configuration", "runs/out", "an absolute path", "storage")
    assert list(tmp_path.iterdir()) == []
    assert output_folder(str(tmp_path / "out")) == tmp_path / "out"


@both
@pytest.mark.parametrize("place", ["file", "file/out", "file/below/out"])
def test_an_output_at_a_file_is_refused(place, train, no_group, tiny: TinyJob, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    _, *arguments = tiny.run(tmp_path / place, *train)
    for command in (["run", *arguments], ["plan", *arguments], _demo(tmp_path / place)):
        assert_refused(call(capsys, command), 3, "configuration", place, "a file")
    assert (tmp_path / "file").read_text() == "kept"


@both
def test_an_output_that_may_not_be_written_is_refused(train, no_group, tiny: TinyJob, tmp_path, capsys, monkeypatch):
    # The tests may be run by root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    _, *arguments = tiny.run(tmp_path / "out", *train)
    for command in (["run", *arguments], ["plan", *arguments], _demo(tmp_path / "out")):
        assert_refused(call(capsys, command), 3, "configuration", str(tmp_path), "may not be written")


def test_a_folder_that_cannot_be_made_is_refused(no_group, tiny: TinyJob, tmp_path, capsys, monkeypatch):
    def fail(self: Path, *arguments: object, **settings: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    outcome = call(capsys, tiny.run(tmp_path / "out"))
    assert_refused(outcome, 3, "configuration", str(tmp_path / "out"), "Read-only file system")


def test_the_home_folder_is_found_and_recorded_as_it_was_written(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny.copy_model(tmp_path / "model")
    paths = {"model.path": "~/model", "retrained": "~/model", "output": "~/out"}
    succeed(capsys, tiny.run(Path("~/out"), *(f"{key}={path}" for key, path in paths.items()), "solver.max_steps=1"))
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (record["base"]["path"], record["config"]["output"]) == ("~/model", "~/out")
    assert record["config"]["retrained"] == "~/model" and "model.safetensors" in record["base"]["files"]
    succeed(capsys, tiny.run(Path("~/trained"), "model.path=~/model", TRAIN))
    assert (tmp_path / "trained" / "checkpoint" / "model.safetensors").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["records.jsonl", "original", "report.html", "unlearned"])
def test_the_demo_replaces_nothing_unasked(name, no_group, tmp_path, capsys):
    (tmp_path / name).write_text("kept")
    assert_refused(call(capsys, _demo(tmp_path)), 3, "configuration", name, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_overwritten_demo_loses_its_summary_before_its_checkpoints(tmp_path, capsys, monkeypatch):
    from distributed_unlearn.demo import run

    for name in ("summary.json", "report.html"):
        (tmp_path / name).write_text("old")

    def crash(*arguments: object) -> None:
        raise RuntimeError("a crash")

    monkeypatch.setattr(run, "create_initial", crash)
    local = {"backend": "in_process", "num_workers": 1, "use_gpu": "never"}
    monkeypatch.setattr("distributed_unlearn.cli._cluster", lambda *given: run.ClusterConfig(**local))
    with pytest.raises(RuntimeError, match="a crash"):
        call(capsys, _demo(tmp_path, "--overwrite"))
    assert not {"summary.json", "report.html"} & {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "summary.previous.json").read_text() == (tmp_path / "report.previous.html").read_text() == "old"
