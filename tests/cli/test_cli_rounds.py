"""Several rounds one after the other, training jobs, and the comparison with a retrained reference."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, call, succeed
from safetensors.torch import load_file
from tiny_job import TinyJob

pytestmark = pytest.mark.usefixtures("quick")


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def _distance(first: Path, second: Path) -> float:
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    return math.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in a))


def test_sequential_rounds(tiny: TinyJob, tmp_path, capsys):
    output = tmp_path / "out"
    rounds = "rounds=[{subjects: [person-0000]}, {record_ids: [person-0001-00]}]"
    outcome = succeed(capsys, tiny.run(output, "forget=null", rounds))
    record = _record(output)
    first, second = record["rounds"]
    assert [r["num_forget_records"] for r in (first, second)] == [3, 1]
    assert [r["num_retain_records"] for r in (first, second)] == [9, 8]
    assert [len(hashes) for hashes in record["erased_ids_sha256_salted"]] == [3, 1]
    # Round 2 starts from round 1's weights and scores round 1's forget set again.
    assert "forget_round_1" not in first["after"]
    assert second["before"]["holdout"] == first["after"]["holdout"]
    assert second["before"]["forget_round_1"] == first["after"]["forget"]
    assert second["after"]["forget_round_1"] != second["before"]["forget_round_1"]
    assert second["before"]["retain"] != first["after"]["retain"]  # one record fewer
    assert (first["round_index"], second["round_index"]) == (0, 1)
    # The whole update is the sum of two: no shorter than their difference, no longer than their sum.
    total, norms = record["surviving_update"]["update_norm"], (first["update_norm"], second["update_norm"])
    assert abs(norms[0] - norms[1]) < total < sum(norms) * (1 + 1e-6)
    assert total not in (pytest.approx(norms[0], rel=1e-3), pytest.approx(norms[1], rel=1e-3))
    assert total == pytest.approx(_distance(tiny.model, output / "checkpoint"), rel=1e-4)
    kinds = [json.loads(line)["kind"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("round_1/step") == kinds.count("round_2/step") == 2 and kinds.count("round") == 2
    # Each round has sets of its own, so each has a row before it too.
    for number, round_record in enumerate(record["rounds"], start=1):
        for when in ("before", "after"):
            (line,) = [line for line in outcome.out.splitlines() if f"{when} round {number} " in line]
            loss = round_record[when]["forget"]["loss_nats_per_token"]
            assert f"{loss:.3f} / " in line
    assert all(selection["subjects"].endswith(" named") for selection in record["config"]["rounds"])


def test_two_rounds_are_two_jobs(tiny: TinyJob, tmp_path, capsys):
    """Going on from a written checkpoint gives, in the end, the weights that a second round gives."""
    both = "rounds=[{subjects: [person-0000]}, {subjects: [person-0001]}]"
    common = ("solver.max_steps=1", "objective.name=retain", "solver.gradient_batch=6", "solver.curvature_batch=6")
    succeed(capsys, tiny.run(tmp_path / "both", "forget=null", both, *common))
    succeed(capsys, tiny.run(tmp_path / "one", *common))
    after_one, after_both = _record(tmp_path / "one"), _record(tmp_path / "both")
    assert after_one["rounds"][0]["after"]["forget"] == after_both["rounds"][0]["after"]["forget"]
    start = f"model.path={tmp_path / 'one' / 'checkpoint'}"
    succeed(capsys, tiny.run(tmp_path / "two", start, "forget={subjects: [person-0001]}", *common))
    # The minibatch is all of the six that are left, so that a job of its own draws what a second round draws.
    alone, second = _record(tmp_path / "two")["rounds"][0], after_both["rounds"][1]
    assert alone["num_retain_records"] == second["num_retain_records"] == 6
    assert alone["steps"][0]["loss"] == pytest.approx(second["steps"][0]["loss"], rel=1e-6)
    for name in ("forget", "retain", "holdout"):
        ends = [record["after"][name]["loss_nats_per_token"] for record in (alone, second)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-5)
        assert ends[0] != pytest.approx(alone["before"][name]["loss_nats_per_token"], rel=1e-3)
    gap = _distance(tmp_path / "two" / "checkpoint", tmp_path / "both" / "checkpoint")
    assert gap < 1e-3 * alone["update_norm"]


@pytest.fixture(scope="module")
def trained(tiny: TinyJob, tmp_path_factory) -> Path:
    """Folder with an `original` and a `retrained` model, trained through the command line."""
    from distributed_unlearn.cli import main

    folder = tmp_path_factory.mktemp("trained")
    common = ("train.epochs=8", "train.batch_size=3", "train.learning_rate=2e-2", "train.zero_stage=2")
    assert main(tiny.run(folder / "original", *common)) == 0
    assert main(tiny.run(folder / "retrained", *common, "train.exclude_forget=true")) == 0
    return folder


def test_training_learns_and_leaves_out(trained: Path, tiny: TinyJob):
    original, retrained = _record(trained / "original"), _record(trained / "retrained")
    assert (original["training"]["num_records"], retrained["training"]["num_records"]) == (12, 9)
    assert (original["training"]["num_steps"], retrained["training"]["num_steps"]) == (8 * 4, 8 * 3)
    for record in (original, retrained):
        losses = {name: scores["loss_nats_per_token"] for name, scores in record["training"]["scores"].items()}
        assert losses["trained_on"] < losses["holdout"] < 20
        assert record["config"]["forget"]["subjects"] == "1 named" and {"torch", "ray"} <= record["versions"].keys()
    assert (
        original["training"]["scores"]["forget"]["loss_nats_per_token"]
        < retrained["training"]["scores"]["forget"]["loss_nats_per_token"]
    )
    assert _distance(tiny.model, trained / "original" / "checkpoint") > 0.1
    lines = [json.loads(line) for line in (trained / "original" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(32))
    assert lines[-1]["values"]["loss_nats_per_token"] < lines[0]["values"]["loss_nats_per_token"]


def test_training_scores_every_round_that_it_leaves_out(tiny: TinyJob, tmp_path, capsys):
    rounds = "rounds=[{subjects: [person-0000]}, {record_ids: [person-0001-00]}]"
    train = "train={epochs: 1, batch_size: 6, zero_stage: 2, exclude_forget: true}"
    outcome = succeed(capsys, tiny.run(tmp_path / "out", "forget=null", rounds, train))
    scores = _record(tmp_path / "out")["training"]["scores"]
    counts = {name: value["num_records"] for name, value in scores.items()}
    assert counts == {"trained_on": 8, "holdout": 6, "retain": 8, "forget_round_1": 3, "forget_round_2": 1}
    assert "forget_round_2: loss " in outcome.out


@pytest.mark.parametrize("stage", [2, 3])
def test_training_moves_what_is_trainable_and_nothing_else(stage, tiny: TinyJob, tmp_path, capsys):
    chosen = ("train={epochs: 1, batch_size: 12}", f"train.zero_stage={stage}", "train.learning_rate=0.01")
    succeed(capsys, tiny.run(tmp_path / "out", 'model.trainable=["*.mlp.down_proj.weight"]', *chosen))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tiny.model, tmp_path / "out" / "checkpoint")
    )
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith("mlp.down_proj.weight")} and moved


def test_tug_of_war_against_the_retrained_model(trained: Path, tiny: TinyJob, tmp_path, capsys):
    output = tmp_path / "out"
    start = f"model.path={trained / 'original' / 'checkpoint'}"
    reference = f"retrained={trained / 'retrained' / 'checkpoint'}"
    outcome = succeed(capsys, tiny.run(output, start, reference, "solver.max_steps=1"))
    record = _record(output)
    after, retrained = record["rounds"][0]["after"], record["retrained"]
    expected = 1.0
    for name in ("forget", "retain", "holdout"):
        expected *= 1.0 - abs(after[name]["exact_memorisation"] - retrained[name]["exact_memorisation"])
    assert record["rounds"][0]["tug_of_war"] == pytest.approx(expected, abs=1e-12) and 0 < expected < 1
    # The reference's scores are those that its own training job measured.
    alone = _record(trained / "retrained")["training"]["scores"]
    for name, other in (("holdout", "holdout"), ("forget", "forget"), ("retain", "trained_on")):
        mine, theirs = retrained[name]["loss_nats_per_token"], alone[other]["loss_nats_per_token"]
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert "retrained" in outcome.out and f"{expected:.3f}" in outcome.out


@pytest.mark.parametrize(("limit", "left_out"), [(8, True), (9, False)])
def test_a_tug_of_war_over_samples_is_left_out_and_said_to_be(limit, left_out, tiny: TinyJob, tmp_path, capsys):
    sample = f"evaluation.max_records_per_set={limit}"  # of 9 records to retain
    outcome = succeed(capsys, tiny.run(tmp_path / "out", f"retrained={tiny.model}", sample, "solver.max_steps=1"))
    assert ("Tug-of-War is left out" in outcome.out) is left_out
    assert (_record(tmp_path / "out")["rounds"][0]["tug_of_war"] is None) is left_out


def test_a_sample_of_records_is_scored(tiny: TinyJob, tmp_path, capsys):
    succeed(capsys, tiny.run(tmp_path / "out", "evaluation.max_records_per_set=2", "solver.max_steps=1"))
    after = _record(tmp_path / "out")["rounds"][0]["after"]
    assert {name: scores["num_records"] for name, scores in after.items()} == dict.fromkeys(after, 2)


def test_the_stopping_rule_ends_a_round(tiny: TinyJob, tmp_path, capsys):
    stop = "solver.stop={forget_matches_holdout: true, forget_tolerance_nats: 5.0, retain_tolerance_nats: 5.0}"
    succeed(capsys, tiny.run(tmp_path / "out", stop, "solver.max_steps=9"))
    (only,) = _record(tmp_path / "out")["rounds"]
    assert only["num_steps"] == 2 and not only["stop_reason"].startswith("max_steps")  # two checks in a row


def test_training_on_a_missing_model_is_refused(tiny: TinyJob, tmp_path, capsys):
    outcome = call(capsys, tiny.run(tmp_path / "out", "model.path=./none", "train={epochs: 1}"))
    assert_refused(outcome, 5, "model", "./none")
