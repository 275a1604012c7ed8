"""A run's record goes to JSON and back unchanged, and a file that is not one is refused with a reason."""

import dataclasses
import json
import math

import pytest

from distributed_unlearn.errors import DataError
from distributed_unlearn.records import (
    BaseCheckpoint,
    CurvatureMode,
    ResultFiles,
    RoundRecord,
    RunRecord,
    SetScores,
    StepRecord,
    SurvivingUpdate,
    TrainingRecord,
    Verdict,
    read_record,
    to_json,
)
from distributed_unlearn.records.codec import from_json
from distributed_unlearn.records.verdict import ForgetVerdict, MeasureEvidence, RetainVerdict

SCORES = {"forget": SetScores(3, 40, 1.5, 0.25), "retain": SetScores(9, 120, 0.5, 1.0)}
STEP = StepRecord(
    step=0,
    loss=1.5,
    gradient_norm=2.0,
    alpha=0.1,
    gamma=None,
    cubic_coefficient=1e-12,
    update_norm=0.0,
    smallest_ritz_value=-0.5,
    largest_ritz_value=3.0,
    residual=None,
    predicted_reduction=0.1,
    actual_reduction=-5.0,
    acceptance_ratio=0.3333333333333333,
    accepted=False,
    num_rejections=8,
    num_krylov_steps=2,
    num_products=2,
    result="rejected",
    wall_seconds=0.25,
    terms={"forget": 0.1 + 0.2},
)
SEEN = MeasureEvidence(0.1, 3.5, None, 0.03, 1.0, 1e-9, 3, 1e-9)
SET = ForgetVerdict("forget", "not forgotten", 3, 12, False, SEEN, SEEN)
VERDICT = Verdict(SET, RetainVerdict("kept", 9, 0.01, 0.0), (SET,))
ROUND = RoundRecord(
    0, 3, 9, 3.25, "max_steps: all 1 steps were taken", 1, 2, 0.5, 1.25, (STEP,), SCORES, SCORES, VERDICT, 0.9
)
RUN = RunRecord(
    kind="unlearning",
    started_at="2026-01-02T03:04:05+00:00",
    config={"solver": {"max_steps": 1, "adaptive": True, "stop": {"max_seconds": None}}, "rounds": ["a", 1]},
    versions={"torch": "2.13.0", "accelerate": None},
    base=BaseCheckpoint("runs/a", None, {"model.safetensors": "ab"}),
    result=ResultFiles("0123", {"model.safetensors": "cd"}),
    num_retain_records=9,
    num_erased_before=1,
    num_erased_before_not_in_data=0,
    parent=None,
    salt_sha256="ee",
    erased_before_sha256_salted=(("dd",),),
    erased_ids_sha256_salted=(("aa", "bb"), ("cc",)),
    rounds=(ROUND,),
    surviving_update=SurvivingUpdate(1.0, 0.9, 0.95, 1.0, "bfloat16"),
    curvature_mode=CurvatureMode(None, 0.0),
    retrained=SCORES,
)
TRAINED = dataclasses.replace(
    RUN, kind="training", rounds=(), retrained=None, training=TrainingRecord(9, 60, 0.1, 12.5, None)
)


@pytest.mark.parametrize("record", [RUN, TRAINED], ids=["unlearning", "training"])
def test_a_record_is_read_as_it_was_written(record, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(to_json(record), allow_nan=False))
    assert read_record(path) == record


def test_numbers_that_json_lacks_come_back_as_nan(tmp_path):
    step = dataclasses.replace(STEP, loss=math.inf, acceptance_ratio=math.nan)
    back = from_json(StepRecord, to_json(step), "step")
    assert math.isnan(back.loss) and back.acceptance_ratio is None


def _spoil(tree, where, value):
    *parents, leaf = where
    for part in parents:
        tree = tree[part]
    if value is None:
        del tree[leaf]
    else:
        tree[leaf] = value


@pytest.mark.parametrize(
    ("where", "value", "got"),
    [
        (("base",), None, "record.json', without base"),
        (("base", "path"), 3, "record.json'.base.path, which is int"),
        (("rounds", 0, "steps", 0, "num_products"), True, "rounds.0.steps.0.num_products, which is bool"),
        (("rounds", 0, "steps", 0, "num_products"), 2.0, "num_products, which is float"),
        (("rounds", 0, "after"), [], "rounds.0.after, which is list"),
        (("rounds",), {}, "rounds, which is dict"),
        (("kind",), "other", "kind, which is none of its values"),
        (("surviving_update", "extra"), 1.0, "surviving_update, with unknown extra"),
    ],
)
def test_a_spoilt_record_is_refused(where, value, got, tmp_path):
    tree = json.loads(json.dumps(to_json(RUN)))
    _spoil(tree, where, value)
    (tmp_path / "record.json").write_text(json.dumps(tree))
    with pytest.raises(DataError) as caught:
        read_record(tmp_path / "record.json")
    assert got in caught.value.got


@pytest.mark.parametrize(
    ("text", "got", "remedy"),
    [
        ('{"format": 1}', "of format 1", "run the job again"),
        ('{"format": 3}', "of format 3", "with the version"),
        ('{"format": true}', "of format True", "with the version"),
        ("[]", "of format None", "with the version"),
        ("{", "not JSON", "a finished run"),
        ("[" * 100_000, "not JSON", "a finished run"),
        (None, "cannot be read", "a finished run"),
    ],
)
def test_what_is_no_record_of_this_format_is_refused(text, got, remedy, tmp_path):
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_record(path)
    assert got in caught.value.got and remedy in caught.value.remedy


def test_a_tensor_is_not_written():
    with pytest.raises(TypeError, match="cannot write object"):
        to_json({"a": [object()]})
