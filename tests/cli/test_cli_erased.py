"""What one job erased stays erased in every later job: known by the record beside the checkpoint, or refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_refused, call, succeed
from tiny_job import TinyJob

pytestmark = pytest.mark.usefixtures("quick")

TRAIN = ("train.epochs=8", "train.batch_size=3", "train.learning_rate=2e-2", "train.zero_stage=2")
FIRST_ORDER = "solver={method: adamw, gradient_batch: 12, stop: {forget_matches_holdout: false}}"
"""The whole section: the job file's keys of the cubic step belong to another method."""
SECOND = "forget={subjects: [person-0001]}"


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def _from(folder: Path) -> str:
    return f"model.path={folder / 'checkpoint'}"


@pytest.fixture(scope="module")
def first(tiny: TinyJob, tmp_path_factory) -> Path:
    """Folder with an `original` that knows its records, and `a`, a job that erased person-0000 from it. Read only."""
    from distributed_unlearn.cli import main

    folder = tmp_path_factory.mktemp("chain")
    assert main(tiny.run(folder / "original", *TRAIN)) == 0
    ascent = (FIRST_ORDER, "objective.name=graddiff", "solver.max_steps=4", "solver.learning_rate=5e-3")
    assert main(tiny.run(folder / "a", _from(folder / "original"), *ascent, "--allow-incomplete")) == 0
    return folder


@pytest.fixture
def moved(first: Path, tmp_path) -> Path:
    """A copy of job a's folder that a test may spoil."""
    return Path(shutil.copytree(first / "a", tmp_path / "moved"))


def test_a_second_job_does_not_learn_again_what_the_first_erased(first: Path, tiny: TinyJob, tmp_path, capsys):
    original, a = (_record(first / name) for name in ("original", "a"))
    after_a = a["rounds"][0]["after"]["forget"]["loss_nats_per_token"]
    assert after_a > original["training"]["scores"]["forget"]["loss_nats_per_token"] + 1  # it was known, and is erased
    assert (a["num_erased_before"], a["num_retain_records"], a["rounds"][0]["num_retain_records"]) == (0, 9, 9)
    # Steps on the retain loss alone: with person-0000 among the retained its loss falls as theirs does.
    retain = (FIRST_ORDER, "objective.name=retain", "solver.max_steps=30", "solver.learning_rate=1e-2")
    outcome = succeed(capsys, tiny.run(tmp_path / "b", _from(first / "a"), SECOND, *retain))
    b = _record(tmp_path / "b")
    assert (b["num_erased_before"], b["num_retain_records"], b["num_erased_before_not_in_data"]) == (3, 6, 0)
    (only,) = b["rounds"]
    assert only["before"]["erased_before_1"] == a["rounds"][0]["after"]["forget"]
    retained = only["after"]["retain"]["loss_nats_per_token"]
    assert retained < only["before"]["retain"]["loss_nats_per_token"] - 2
    assert only["after"]["erased_before_1"]["loss_nats_per_token"] > max(retained + 2, after_a - 1)
    said = "erased before: 3, in no retain, holdout or training set"
    assert said in outcome.out
    assert said in (tmp_path / "b" / "report.html").read_text()
    assert said in (tmp_path / "b" / "checkpoint" / "README.md").read_text()
    assert said in succeed(capsys, ["plan", *tiny.run(tmp_path / "x", _from(first / "a"), SECOND)[1:]]).out


def test_a_third_job_knows_the_first_although_its_folder_is_gone(moved: Path, tiny: TinyJob, tmp_path, capsys):
    one = "solver.max_steps=1"
    parent = hashlib.sha256((moved / "record.json").read_bytes()).hexdigest()
    rounds = "rounds=[{subjects: [person-0001]}, {record_ids: [person-0002-00]}]"
    succeed(capsys, tiny.run(tmp_path / "b", _from(moved), "forget=null", rounds, one))
    assert _record(tmp_path / "b")["parent"] == parent
    shutil.rmtree(moved)
    succeed(capsys, tiny.run(tmp_path / "c", _from(tmp_path / "b"), "forget={record_ids: [person-0002-01]}", one))
    c = _record(tmp_path / "c")
    assert (c["num_erased_before"], c["num_retain_records"]) == (7, 4)
    salt = (tmp_path / "c" / "record.salt").read_text().strip()
    named = [[f"person-000{person}-0{k}" for k in range(3)] for person in (0, 1)] + [["person-0002-00"]]
    hashed = [sorted(hashlib.sha256(f"{salt}\0{name}".encode()).hexdigest() for name in names) for names in named]
    assert c["erased_before_sha256_salted"] == hashed
    after = c["rounds"][0]["after"]
    assert [after[f"erased_before_{k}"]["num_records"] for k in (1, 2, 3)] == [3, 3, 1]
    mark = json.loads((tmp_path / "c" / "checkpoint" / "unlearning.json").read_text())
    assert mark == {"format": 1, "result": c["result"]["id"], "num_erased": 8}


def test_training_leaves_out_what_was_erased_and_hands_it_on(first: Path, tiny: TinyJob, tmp_path, capsys):
    train = ("train={epochs: 1, batch_size: 6, zero_stage: 2}", "forget=null")
    succeed(capsys, tiny.run(tmp_path / "tuned", _from(first / "a"), *train))
    tuned = _record(tmp_path / "tuned")
    assert (tuned["training"]["num_records"], tuned["num_erased_before"]) == (9, 3)
    assert tuned["training"]["scores"]["erased_before_1"]["num_records"] == 3
    succeed(capsys, tiny.run(tmp_path / "b", _from(tmp_path / "tuned"), SECOND, "solver.max_steps=1"))
    assert _record(tmp_path / "b")["num_erased_before"] == 3
    # What a retrained reference leaves out is erased from it, too.
    left_out = ("train={epochs: 1, batch_size: 6, zero_stage: 2, exclude_forget: true}",)
    succeed(capsys, tiny.run(tmp_path / "reference", *left_out))
    assert _record(tmp_path / "reference")["num_erased_before"] == 0
    outcome = succeed(capsys, ["plan", *tiny.run(tmp_path / "x", _from(tmp_path / "reference"), SECOND)[1:]])
    assert "erased before: 3" in outcome.out
    # And a reference that was trained on what is erased is no reference.
    for name, warned in (("original", True), ("reference", False)):
        folder = first / name if warned else tmp_path / name
        reference = f"retrained={folder / 'checkpoint'}"
        outcome = succeed(capsys, ["plan", *tiny.run(tmp_path / "x", reference)[1:]])
        assert ("does not leave out 3 of 3 erased records" in outcome.out) == warned


def test_a_repeated_request_is_forgotten_once_more(first: Path, tiny: TinyJob, tmp_path, capsys):
    succeed(capsys, tiny.run(tmp_path / "b", _from(first / "a"), "solver.max_steps=1"))
    b = _record(tmp_path / "b")
    assert (b["num_erased_before"], b["num_retain_records"]) == (3, 9)
    assert "erased_before_1" not in b["rounds"][0]["after"]
    assert json.loads((tmp_path / "b" / "checkpoint" / "unlearning.json").read_text())["num_erased"] == 3


def _no_salt(folder: Path) -> None:
    (folder / "record.salt").unlink()


def _other_salt(folder: Path) -> None:
    (folder / "record.salt").write_text("0" * 32 + "\n")


def _no_record(folder: Path) -> None:
    (folder / "record.json").unlink()


def _half_a_record(folder: Path) -> None:
    text = (folder / "record.json").read_text()
    (folder / "record.json").write_text(text[: len(text) // 2])


def _other_record(folder: Path) -> None:
    tree = _record(folder)
    (folder / "record.json").write_text(json.dumps({**tree, "result": {**tree["result"], "id": "0" * 32}}))


def _odd_hashes(folder: Path) -> None:
    (folder / "record.json").write_text(json.dumps({**_record(folder), "erased_ids_sha256_salted": [["person-0000"]]}))


def _garbled_mark(folder: Path) -> None:
    (folder / "checkpoint" / "unlearning.json").write_text("{")


SPOILT = [_no_salt, _other_salt, _no_record, _half_a_record, _other_record, _odd_hashes, _garbled_mark]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__.strip("_"))
def test_a_lost_past_is_refused_unless_the_job_tells_it(spoil, moved: Path, tiny: TinyJob, tmp_path, capsys):
    spoil(moved)
    for arguments in (tiny.run(tmp_path / "b", _from(moved), SECOND), tiny.run(tmp_path / "b", _from(moved), *TRAIN)):
        for command in ("run", "plan"):
            outcome = call(capsys, [command, *arguments[1:]])
            assert_refused(outcome, 5, "model", "put both back beside the checkpoint", "data.erased")
            assert not (tmp_path / "b").exists() and "person-0000" not in outcome.err
    told = "data.erased={subjects: [person-0000, nobody], record_ids: [person-0000-01, gone-17]}"
    outcome = succeed(capsys, ["plan", *tiny.run(tmp_path / "b", _from(moved), SECOND, told)[1:]])
    assert "erased before: 4, in no retain, holdout or training set (1 of them not in this data); " in outcome.out
    assert "no record of 1 subject(s) of data.erased" in outcome.out


def test_a_checkpoint_copied_away_from_its_record_is_recognised(first: Path, tiny: TinyJob, tmp_path, capsys):
    copy = shutil.copytree(first / "a" / "checkpoint", tmp_path / "models" / "mine")
    outcome = call(capsys, tiny.run(tmp_path / "b", f"model.path={copy}", SECOND))
    assert_refused(outcome, 5, "model", "from which 3 record(s) were erased, without", "data.erased")
    # Nothing was erased from the original: it may be opened wherever it is.
    copy = shutil.copytree(first / "original" / "checkpoint", tmp_path / "models" / "other")
    assert "erased before" not in succeed(capsys, ["plan", *tiny.run(tmp_path / "b", f"model.path={copy}")[1:]]).out


def test_a_result_of_a_version_without_marks_is_recognised(moved: Path, tiny: TinyJob, tmp_path, capsys):
    (moved / "checkpoint" / "unlearning.json").unlink()
    tree = _record(moved)
    del tree["result"]["id"], tree["result"]["files"]["unlearning.json"], tree["salt_sha256"]
    (moved / "record.json").write_text(json.dumps(tree))
    plan = ["plan", *tiny.run(tmp_path / "b", _from(moved), SECOND)[1:]]
    assert "erased before: 3" in succeed(capsys, plan).out
    tree["result"]["files"]["config.json"] = "0" * 64
    (moved / "record.json").write_text(json.dumps(tree))
    assert_refused(call(capsys, plan), 5, "model", "tells of another checkpoint")


def test_ids_named_by_the_job_are_handed_on(tiny: TinyJob, tmp_path, capsys):
    ids = tmp_path / "erased.txt"
    ids.write_text("person-0002-00\ngone-17\n")
    told = f"data.erased={{ids_file: {ids}, record_ids: [person-0002-01]}}"
    succeed(capsys, tiny.run(tmp_path / "a", told, "solver.max_steps=1"))
    a = _record(tmp_path / "a")
    assert (a["num_erased_before"], a["num_erased_before_not_in_data"], a["num_retain_records"]) == (3, 1, 7)
    assert a["config"]["data"]["erased"]["record_ids"] == "1 named"
    assert a["config"]["data"]["erased"]["ids_file"] == "a file"
    assert not any(name in (tmp_path / "a" / "record.json").read_text() for name in ("gone-17", "person-0002"))
    # A later job whose data holds the id again knows it.
    renamed = tmp_path / "records.jsonl"
    renamed.write_text(tiny.records.read_text().replace("person-0003-01", "gone-17"))
    arguments = tiny.run(tmp_path / "b", _from(tmp_path / "a"), SECOND, f"data.path={renamed}")
    assert "erased before: 6, in no" in succeed(capsys, ["plan", *arguments[1:]]).out


def test_changed_ids_are_counted_and_reported(first: Path, tiny: TinyJob, tmp_path, capsys):
    renamed = tmp_path / "records.jsonl"
    renamed.write_text(tiny.records.read_text().replace("person-0000-0", "somebody-"))
    arguments = tiny.run(tmp_path / "b", _from(first / "a"), SECOND, f"data.path={renamed}")
    assert "(3 of them not in this data)" in succeed(capsys, ["plan", *arguments[1:]]).out


def test_what_was_erased_can_not_be_held_out(first: Path, tiny: TinyJob, tmp_path, capsys):
    held = "holdout={subjects: [person-0000, person-0004]}"
    outcome = call(capsys, tiny.run(tmp_path / "b", _from(first / "a"), SECOND, held))
    assert_refused(outcome, 4, "data", "3 record(s) held out that were erased", "take them out of holdout")


def test_an_interrupted_replacement_is_known_to_the_next_start(moved: Path, tiny: TinyJob, capsys, monkeypatch):
    """In place: the checkpoint is there, its record is not yet; the next start writes it and goes on."""

    def crash(*arguments: object) -> None:
        raise RuntimeError("a crash")

    in_place = (_from(moved), SECOND, "overwrite=true", "solver.max_steps=1")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a crash"):
        patch.setattr("distributed_unlearn.rounds.pending.write_private", crash)
        call(capsys, tiny.run(moved, *in_place))
    assert not (moved / "record.salt").exists()
    assert "erased before: 6" in call(capsys, tiny.run(moved, *in_place)).out


def test_a_round_in_place_hands_its_own_past_on(moved: Path, tiny: TinyJob, capsys):
    succeed(capsys, tiny.run(moved, _from(moved), SECOND, "overwrite=true", "solver.max_steps=1"))
    outcome = succeed(capsys, ["plan", *tiny.run(moved, _from(moved), "overwrite=true", SECOND)[1:]])
    assert "erased before: 6" in outcome.out


def test_an_adapter_hands_on_what_it_and_its_base_erased(moved: Path, tiny: TinyJob, tmp_path, capsys):
    lora, one = "model.adapter={name: lora, rank: 2}", "solver.max_steps=1"
    base = moved / "checkpoint"
    succeed(capsys, tiny.run(tmp_path / "b", _from(moved), SECOND, lora, one))
    assert _record(tmp_path / "b")["num_erased_before"] == 3
    adapter, third = tmp_path / "b" / "checkpoint", "forget={record_ids: [person-0002-00]}"
    for opened in ((f"model.path={base}", f"model.adapter={{path: {adapter}}}"), (f"model.path={adapter}",)):
        outcome = succeed(capsys, ["plan", *tiny.run(tmp_path / "c", *opened, third)[1:]])
        assert "erased before: 6, in no" in outcome.out
    # A new adapter on the base of another knows the base's; an adapter without its record is refused.
    (tmp_path / "b" / "record.json").unlink()
    assert "erased before: 3" in succeed(capsys, ["plan", *tiny.run(tmp_path / "c", _from(moved), third, lora)[1:]]).out
    outcome = call(capsys, ["plan", *tiny.run(tmp_path / "c", f"model.path={adapter}", third)[1:]])
    assert_refused(outcome, 5, "model", "from which 6 record(s) were erased, without", "data.erased")
