"""A checkpoint is never without the record of how it came to be, nor beside another's, wherever a run ends."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, succeed
from tiny_job import TinyJob, save_model

from distributed_unlearn.rounds.pending import PENDING_NAME

pytestmark = pytest.mark.usefixtures("quick")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _record(folder: Path, name: str = "record.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _crash(*arguments: object, **settings: object) -> None:
    raise RuntimeError("a crash")


def _assert_record_is_of_the_checkpoint(output: Path) -> None:
    files = _record(output)["result"]["files"]
    assert files["model.safetensors"] == _hash(output / "checkpoint" / "model.safetensors")


TRAIN = "train={epochs: 1, batch_size: 6, zero_stage: 2}"


@pytest.mark.parametrize("train", [(), (TRAIN,)], ids=["unlearn", "train"])
def test_workers_that_cannot_be_ended_cost_no_record(train, tiny: TinyJob, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distributed_unlearn.cluster.in_process.InProcessGroup.shutdown", _crash)
    with pytest.raises(RuntimeError, match="a crash"):
        call(capsys, tiny.run(tmp_path / "out", "solver.max_steps=1", *train))
    _assert_record_is_of_the_checkpoint(tmp_path / "out")
    assert train or len((tmp_path / "out" / "record.salt").read_text()) == 33


def test_scores_that_cannot_be_had_cost_no_training(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distributed_unlearn.rounds.training.evaluate_sets", _crash)
    with pytest.raises(RuntimeError, match="a crash"):
        call(capsys, tiny.run(tmp_path / "out", TRAIN))
    _assert_record_is_of_the_checkpoint(tmp_path / "out")
    assert _record(tmp_path / "out")["training"]["scores"] is None


def test_versions_that_cannot_be_had_cost_no_work(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distributed_unlearn.rounds.origin.package_versions", _crash)
    with pytest.raises(RuntimeError, match="a crash"):
        call(capsys, tiny.run(tmp_path / "out", "solver.max_steps=1"))
    assert not (tmp_path / "out").exists()


def test_a_crash_before_the_record_leaves_no_other_record(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    succeed(capsys, tiny.run(output, "solver.max_steps=1"))
    old = {name: (output / name).read_bytes() for name in ("record.json", "record.salt", "report.html")}
    weights = _hash(output / "checkpoint" / "model.safetensors")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a crash"):
        patch.setattr("distributed_unlearn.rounds.pending.write_private", _crash)
        call(capsys, tiny.run(output, "solver.max_steps=2", "overwrite=true"))
    assert _hash(output / "checkpoint" / "model.safetensors") != weights
    assert [name for name in old if (output / name).exists()] == []
    aside = {f"{Path(name).stem}.previous{Path(name).suffix}": content for name, content in old.items()}
    assert {name: (output / name).read_bytes() for name in aside} == aside
    # What is aside is the last complete evidence: a run without a record did not displace it.
    (output / PENDING_NAME).unlink()
    succeed(capsys, tiny.run(output, "solver.max_steps=1", "overwrite=true"))
    _assert_record_is_of_the_checkpoint(output)
    assert {name: (output / name).read_bytes() for name in aside} == aside


BEFORE, AFTER = "before the checkpoint is in place", "after it"
MOMENTS = {
    "its papers announced": ("distributed_unlearn.files._flush", BEFORE),
    "in place": ("distributed_unlearn.rounds.pending.write_private", AFTER),
    "the salt written": ("distributed_unlearn.rounds.pending.write_json", AFTER),
    "the record written": ("distributed_unlearn.rounds.unlearning.forget_state", AFTER),
    "the report drawn": ("distributed_unlearn.commands.run.settle", AFTER),
}


def _assert_complete(output: Path) -> None:
    _assert_record_is_of_the_checkpoint(output)
    mark = json.loads((output / "checkpoint" / "unlearning.json").read_text())["result"]
    assert mark == _record(output)["result"]["id"]
    assert len((output / "record.salt").read_text()) == 33 and (output / "record.salt").stat().st_mode & 0o777 == 0o600
    left = {path.name for path in output.iterdir() if ".previous" not in path.name} - {"pictures"}
    assert left == {"checkpoint", "metrics.jsonl", "record.json", "record.salt", "report.html", "tensorboard"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_ended_around_its_result_is_completed_by_the_same_command(
    moment, tiny: TinyJob, tmp_path, capsys, monkeypatch
):
    """Also where another record was there: the papers of what was replaced are aside, as ever."""
    output, (patched, when) = tmp_path / "out", MOMENTS[moment]
    command = tiny.run(output, "solver.max_steps=1", "save.state_every_steps=1")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a crash"):
        patch.setattr(patched, _crash)
        call(capsys, command)
    assert (output / "checkpoint").exists() == (when == AFTER)
    before = _hash(output / "checkpoint" / "model.safetensors") if when == AFTER else None
    with monkeypatch.context() as patch:
        if when == AFTER:  # the weights are there: no worker is started for them
            patch.setattr("distributed_unlearn.commands.run.run_session", _crash)
        out = succeed(capsys, command).out
    assert ("its record is completed" in out) == (when == AFTER)
    assert before in (None, _hash(output / "checkpoint" / "model.safetensors"))
    _assert_complete(output)
    assert "output" in call(capsys, command).err  # a complete result is not replaced unasked


def test_another_job_does_not_take_over_what_was_completed(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a crash"):
        patch.setattr("distributed_unlearn.rounds.pending.write_private", _crash)
        call(capsys, tiny.run(output, "solver.max_steps=1"))
    outcome = call(capsys, tiny.run(output, "solver.max_steps=2"))
    assert outcome.code == 3 and "which exists" in outcome.err
    _assert_record_is_of_the_checkpoint(output)  # completed, so that a job may go on from it
    assert (output / PENDING_NAME).stat().st_mode & 0o777 == 0o600
    again = ("forget={subjects: [person-0001]}", "solver.max_steps=1")
    succeed(capsys, tiny.run(tmp_path / "next", f"model.path={output / 'checkpoint'}", *again))
    assert _record(tmp_path / "next")["num_erased_before"] == 3


def test_a_training_that_ended_before_its_scores_says_so(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a crash"):
        patch.setattr("distributed_unlearn.rounds.training.evaluate_sets", _crash)
        call(capsys, tiny.run(tmp_path / "out", TRAIN))
    assert "was not scored" in succeed(capsys, tiny.run(tmp_path / "out", TRAIN)).out
    _assert_record_is_of_the_checkpoint(tmp_path / "out")


KILLED = """
import os, signal, sys
from distributed_unlearn.rounds import unlearning
unlearning.write_record = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
from distributed_unlearn.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_driver_that_is_killed_just_after_the_rename(tiny: TinyJob, tmp_path, capsys):
    command = tiny.run(tmp_path / "out", "solver.max_steps=1")
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "checkpoint").exists() and not (tmp_path / "out" / "record.json").exists()
    succeed(capsys, command)
    _assert_complete(tmp_path / "out")


def test_a_failed_replacement_keeps_the_record(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    succeed(capsys, tiny.run(output, "solver.max_steps=1"))
    monkeypatch.setattr("distributed_unlearn.engine.export.write_tokenizer", _crash)
    with pytest.raises(RuntimeError, match="a crash"):
        call(capsys, tiny.run(output, "solver.max_steps=2", "overwrite=true"))
    _assert_record_is_of_the_checkpoint(output)
    assert list(output.glob("*.previous.json")) == []


def test_a_training_does_not_keep_the_salt_of_what_it_replaces(tiny: TinyJob, tmp_path, capsys):
    output = tmp_path / "out"
    succeed(capsys, tiny.run(output, "solver.max_steps=1"))
    succeed(capsys, tiny.run(output, TRAIN, "overwrite=true"))
    assert not (output / "record.salt").exists() and (output / "record.previous.salt").exists()
    record = _record(output)
    assert record["base"]["files"]["model.safetensors"] == _hash(tiny.model / "model.safetensors")
    _assert_record_is_of_the_checkpoint(output)


def test_the_base_of_a_round_in_place_is_what_was_there_before(tiny: TinyJob, tmp_path, capsys):
    output = tmp_path / "out"
    succeed(capsys, tiny.run(output, "solver.max_steps=1"))
    first = _hash(output / "checkpoint" / "model.safetensors")
    again = ("forget={subjects: [person-0001]}", "overwrite=true", "solver.max_steps=1")
    succeed(capsys, tiny.run(output, f"model.path={output / 'checkpoint'}", *again))
    record = _record(output)
    assert record["base"]["files"]["model.safetensors"] == first
    assert record["result"]["files"]["model.safetensors"] != first


def test_fp32_weights_are_hashed_too(tiny: TinyJob, tmp_path, capsys):
    model = tiny.copy_model(tmp_path / "model")
    save_model(model, torch.bfloat16)
    output = tmp_path / "out"
    succeed(capsys, tiny.run(output, f"model.path={model}", "save.fp32_master=true", "solver.max_steps=1"))
    files = _record(output)["result"]["files"]
    master = "fp32_master/model.safetensors"
    assert files[master] == _hash(output / "checkpoint" / master) != files["model.safetensors"]


def test_the_commit_of_a_hub_model_is_recorded_and_opened(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    """A branch may move on while a job runs: the workers are told the commit, not the branch."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    tiny.copy_model(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    from distributed_unlearn.engine import worker

    opened = []

    def watch(config: Any, *arguments: Any) -> Any:
        opened.append((config.path, config.revision))
        return open_model(config, *arguments)

    open_model = worker.open_model
    monkeypatch.setattr(worker, "open_model", watch)
    succeed(capsys, tiny.run(tmp_path / "out", "model.path=owner/tiny", "solver.max_steps=1"))
    record = _record(tmp_path / "out")
    assert record["base"] == {"path": "owner/tiny", "revision": COMMIT, "files": None, "others": {}}
    assert record["config"]["model"]["revision"] is None
    assert opened == [("owner/tiny", COMMIT)]


def test_the_file_of_a_request_is_not_named(tiny: TinyJob, tmp_path, capsys):
    request = tmp_path / "jane-doe.txt"
    request.write_text("person-0000-00\n")
    request.chmod(0o640)
    command = tiny.run(tmp_path / "out", f"forget={{ids_file: {request}}}", "solver.max_steps=1")
    warning = "warning: the ids file of forget can be read by other users: chmod 600"
    for arguments in (["plan", *command[1:]], command):
        outcome = succeed(capsys, arguments)
        assert warning in " ".join(outcome.out.split()) and "jane-doe" not in outcome.out
    request.chmod(0o600)
    assert warning not in " ".join(succeed(capsys, ["plan", *command[1:], "overwrite=true"]).out.split())
    assert _record(tmp_path / "out")["config"]["forget"]["ids_file"] == "a file"
    texts = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [text for text in texts if b"jane-doe" in text] == []
