"""A checkpoint is never without the record of how it came to be, nor beside another's, wherever a run ends."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, succeed
from tiny_job import TinyJob, save_model

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
        patch.setattr("distributed_unlearn.rounds.result.write_private", _crash)
        call(capsys, tiny.run(output, "solver.max_steps=2", "overwrite=true"))
    assert _hash(output / "checkpoint" / "model.safetensors") != weights
    assert [name for name in old if (output / name).exists()] == []
    aside = {f"{Path(name).stem}.previous{Path(name).suffix}": content for name, content in old.items()}
    assert {name: (output / name).read_bytes() for name in aside} == aside
    # What is aside is the last complete evidence: a run without a record did not displace it.
    succeed(capsys, tiny.run(output, "solver.max_steps=1", "overwrite=true"))
    _assert_record_is_of_the_checkpoint(output)
    assert {name: (output / name).read_bytes() for name in aside} == aside


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
    assert record["base"] == {"path": "owner/tiny", "revision": COMMIT, "files": None}
    assert record["config"]["model"]["revision"] is None
    assert opened == [("owner/tiny", COMMIT)]


def test_the_file_of_a_request_is_not_named(tiny: TinyJob, tmp_path, capsys):
    request = tmp_path / "jane-doe.txt"
    request.write_text("person-0000-00\n")
    succeed(capsys, tiny.run(tmp_path / "out", f"forget={{ids_file: {request}}}", "solver.max_steps=1"))
    assert _record(tmp_path / "out")["config"]["forget"]["ids_file"] == "a file"
    texts = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [text for text in texts if b"jane-doe" in text] == []
