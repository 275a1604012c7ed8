"""Every unlearning run ends with a verdict by measurement, and a run that did not forget does not end with 0."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from tiny_job import TinyJob

from distributed_unlearn.cli import INCOMPLETE, main

pytestmark = pytest.mark.usefixtures("quick")

TRAIN = ("train.epochs=60", "train.batch_size=6", "train.learning_rate=1e-2", "train.zero_stage=2")
ADAMW = ("solver={method: adamw, gradient_batch: 12, stop: {forget_matches_holdout: true}}",)
FORGETS = (*ADAMW, "solver.max_steps=40", "solver.learning_rate=5e-3", "solver.stop.forget_tolerance_nats=0.5")
NOTHING = {
    "one step": (*ADAMW, "solver.max_steps=1", "solver.learning_rate=2e-4"),
    "nothing trainable": (*ADAMW, "solver.max_steps=5", "model.trainable=[]"),
    "no forget term": (*ADAMW, "solver.max_steps=5", "objective.forget_weight=0"),
}


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def known(tiny: TinyJob, tmp_path_factory) -> str:
    """A model that recites its records, as an override. Read only."""
    folder = tmp_path_factory.mktemp("known")
    assert main(tiny.run(folder / "original", *TRAIN)) == 0
    scores = _record(folder / "original")["training"]["scores"]
    assert scores["forget"]["exact_memorisation"] > 0.95 > 0.6 > scores["holdout"]["exact_memorisation"]
    return f"model.path={folder / 'original' / 'checkpoint'}"


@pytest.mark.parametrize("name", NOTHING)
def test_a_run_that_forgets_nothing_says_so(name, known: str, tiny: TinyJob, tmp_path, capsys):
    output = tmp_path / "out"
    outcome = call(capsys, tiny.run(output, known, *NOTHING[name]))
    assert outcome.code == INCOMPLETE == 10 and outcome.err == ""
    said = "NOT FORGOTTEN: the model still knows the 3 record(s) to forget"
    assert said in outcome.out and "round 1: not forgotten, retain set kept" in outcome.out
    page, card = (output / "report.html").read_text(), (output / "checkpoint" / "README.md").read_text()
    assert page.index(said) < page.index("<table") and said in card
    assert "records erased" not in card and "were erased" not in card
    record = _record(output)
    assert record["verdict"]["is_good"] is False and record["verdict"]["sentences"][0].startswith(said)
    found = record["rounds"][0]["verdict"]
    assert found["forget"]["outcome"] == "not forgotten" and found["retain"]["outcome"] == "kept"
    assert found["forget"]["loss"]["gap_closed"] < 0.25
    # The same run, accepted.
    again = call(capsys, tiny.run(output, known, *NOTHING[name], "overwrite=true", "--allow-incomplete"))
    assert again.code == 0 and said in again.out


def test_a_model_that_never_knew_the_records_is_no_success(tiny: TinyJob, tmp_path, capsys):
    """Somebody named the checkpoint before fine-tuning, say: it must not look as if its records had been forgotten."""
    outcome = call(capsys, tiny.run(tmp_path / "out", "solver.max_steps=1"))
    assert outcome.code == INCOMPLETE and "NOTHING TO FORGET WAS FOUND: before the first step" in outcome.out
    assert "To forget more" not in outcome.out
    record = _record(tmp_path / "out")
    assert record["rounds"][0]["verdict"]["forget"]["outcome"] == "nothing to forget"
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    assert "NOTHING TO FORGET" in card and "Forgotten:" not in card


def test_forgotten_and_kept_ends_with_0(known: str, tiny: TinyJob, tmp_path, capsys):
    outcome = call(capsys, tiny.run(tmp_path / "out", known, *FORGETS))
    assert outcome.code == 0, outcome.out
    assert "\nForgotten: the 3 record(s) to forget" in outcome.out and "\nKept: since the start" in outcome.out
    found = _record(tmp_path / "out")["rounds"][0]["verdict"]
    assert found["forget"]["loss"]["gap_closed"] > 0.75 and found["forget"]["missed"]["gap_closed"] > 0.75


def test_damage_is_measured_from_the_start_of_the_job(known: str, tiny: TinyJob, tmp_path, capsys):
    """Each of three rounds costs the retain set a little; together they ruin it, and the last alone would not show."""
    rounds = "rounds=[{subjects: [person-0000]}, {record_ids: [person-0001-00]}, {record_ids: [person-0001-01]}]"
    ascent = ("objective.name=gradient_ascent", *ADAMW[:2], "solver.max_steps=2", "solver.learning_rate=2e-3")
    outcome = call(capsys, tiny.run(tmp_path / "out", known, "forget=null", rounds, *ascent))
    assert outcome.code == INCOMPLETE and "DAMAGED: since the start of the job" in outcome.out
    record = _record(tmp_path / "out")
    last = record["rounds"][-1]
    whole = last["verdict"]["retain"]["loss_rise_nats_per_token"]
    alone = last["after"]["retain"]["loss_nats_per_token"] - last["before"]["retain"]["loss_nats_per_token"]
    assert whole > alone + 0.1
    # Damaged weights make unseen records hard, too: what is unseen is taken from the start of the job.
    targets = {item["holdout_loss_nats_per_token"] for item in record["rounds"]}
    assert len(targets) == 1 and targets == {record["rounds"][0]["before"]["holdout"]["loss_nats_per_token"]}
    assert last["before"]["holdout"]["loss_nats_per_token"] not in targets
    assert [found["set_name"] for found in last["verdict"]["earlier"]] == ["forget_round_1", "forget_round_2"]


def test_what_comes_back_is_said(known: str, tiny: TinyJob, tmp_path, capsys):
    """A later job whose checkpoint learned again what the first erased: the ids are all that anybody is told."""
    told = "data.erased={subjects: [person-0001]}"
    outcome = call(capsys, tiny.run(tmp_path / "out", known, *FORGETS, told))
    assert outcome.code == INCOMPLETE and "\nForgotten: " in outcome.out
    assert "NO LONGER FORGOTTEN: of 1 earlier set(s) erased before 1 is " in outcome.out


def test_without_a_holdout_nothing_is_claimed(known: str, tiny: TinyJob, tmp_path, capsys):
    free = ("holdout=null", "objective.name=graddiff", "solver.max_steps=1")
    outcome = call(capsys, tiny.run(tmp_path / "out", known, *free))
    assert outcome.code == INCOMPLETE
    assert "Forgetting was not measured: without a holdout set" in outcome.out
    record = _record(tmp_path / "out")
    assert record["rounds"][0]["verdict"]["forget"] is None
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    assert "Forgetting was not measured" in card and "Forgotten" not in card
