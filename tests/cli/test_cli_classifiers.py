"""Whole jobs on classifiers of images: training, unlearning by every method, plan, check, and what is refused."""

import json

import numpy as np
import pytest
import yaml
from command_line import assert_refused, call, succeed
from sklearn.datasets import load_digits
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor

from distributed_unlearn.models.cnn import TwoLayerCNNConfig, TwoLayerCNNForImageClassification
from tests.classifiers import tiny_classifier

pytestmark = pytest.mark.usefixtures("quick")

CNN_SIZE = 3 * 10 + 4 * 28 + 4 * 4 * 10 + 10
METHODS = {
    "krylov": "{method: scurenewton, inner: krylov, max_krylov_steps: 2",
    "descent": "{method: scurenewton, inner: gradient_descent, inner_steps: 2",
    "curenewton": "{method: curenewton, cubic_coefficient: 1000.0",
    "damped_newton": "{method: damped_newton, max_cg_steps: 3",
    "pinv_newton": "{method: pinv_newton, cutoff: 0.5",
    "adamw": "{method: adamw",
}
NO_CURVATURE = ("adamw",)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A tiny CNN that has an image processor, and a job on 60 digits that is neither a training nor an unlearning."""
    folder = tmp_path_factory.mktemp("digits")
    names = {number: str(number) for number in range(10)}
    config = TwoLayerCNNConfig(image_size=8, first_channels=3, second_channels=4, id2label=names)
    TwoLayerCNNForImageClassification(config).save_pretrained(folder / "model")
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(folder / "model")
    job = {
        "model": {"path": str(folder / "model"), "task": "image_classification"},
        "data": {"path": "sklearn:digits", "split": "train[:60]", "format": "image"},
        "holdout": {"path": "sklearn:digits", "split": "train[60:80]"},
        "cluster": {"backend": "in_process", "num_workers": 1, "zero_stage": 3, "use_gpu": "never"},
        "output": "-",
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return folder


def arguments(digits, command, *overrides):
    return [command, str(digits / "job.yaml"), *overrides]


def solver(method):
    stop = "stop: {forget_matches_holdout: false}"
    curvature = "" if method in NO_CURVATURE else ", curvature_batch: 6"
    return f"solver={METHODS[method]}, gradient_batch: 8{curvature}, max_steps: 1, {stop}}}"


def test_a_training_and_a_round_on_what_it_wrote(digits, tmp_path, capsys):
    train = "train={epochs: 2, batch_size: 20, learning_rate: 0.01}"
    outcome = succeed(capsys, arguments(digits, "run", train, f"output={tmp_path / 'trained'}"))
    assert "60 trained on, to forget none, held out 20, longest 8 pixels a side" in outcome.out
    trained = tmp_path / "trained" / "checkpoint"
    assert (trained / "preprocessor_config.json").exists() and not (trained / "tokenizer.json").exists()
    assert AutoConfig.from_pretrained(trained).id2label[3] == "3"
    unlearn = [f"model.path={trained}", f"retrained={trained}", "forget={classes: [3, '7']}", "objective.name=npo"]
    target = tmp_path / "unlearned"
    succeed(capsys, arguments(digits, "run", *unlearn, solver("krylov"), f"output={target}"))
    record = json.loads((target / "record.json").read_text())
    forgotten = record["rounds"][0]
    labels = load_digits().target[:60]
    num_forgotten = int(np.isin(labels, [3, 7]).sum())
    assert forgotten["num_forget_records"] == num_forgotten == forgotten["after"]["forget"]["num_answer_tokens"]
    assert forgotten["num_retain_records"] == 60 - num_forgotten and 0.5 < forgotten["tug_of_war"] <= 1
    model = AutoModelForImageClassification.from_pretrained(target / "checkpoint")
    assert type(model) is TwoLayerCNNForImageClassification
    succeed(capsys, arguments(digits, "run", f"model.path={target / 'checkpoint'}", "forget={classes: [4]}",
                              "objective.name=retain", solver("krylov"), f"output={tmp_path / 'again'}"))  # fmt: skip
    again = json.loads((tmp_path / "again" / "record.json").read_text())
    assert again["num_erased_before"] == num_forgotten
    assert again["num_retain_records"] == 60 - num_forgotten - int((labels == 4).sum())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(method, digits, tmp_path, capsys):
    overrides = ("forget={record_ids: [digit-0003, digit-0010]}", "objective.name=holdout_matched", solver(method))
    succeed(capsys, arguments(digits, "run", *overrides, f"output={tmp_path / 'out'}"))
    record = json.loads((tmp_path / "out" / "record.json").read_text())["rounds"][0]
    assert record["num_steps"] == 1 and record["update_norm"] > 0
    expected = {"adamw": 0, "krylov": 2, "damped_newton": 3}
    if method in expected:
        assert record["num_products"] == expected[method]
    if method in ("curenewton", "pinv_newton"):
        assert record["num_products"] == CNN_SIZE


def test_plan_and_check(digits, capsys, tmp_path):
    forget = "forget={classes: [3]}"
    out = succeed(capsys, arguments(digits, "plan", forget, f"output={tmp_path / 'out'}", solver("krylov"))).out
    assert f"{CNN_SIZE:,}" in out and "batch normalisation" not in out
    tiny_classifier("resnet").save_pretrained(tmp_path / "resnet")
    settings = ["--task", "image_classification", "--num-workers", "1", "--backend", "in_process"]
    checked = succeed(capsys, ["check", "curvature", "--model", str(tmp_path / "resnet"), *settings]).out
    assert "note: 9 layer(s) of batch normalisation use their running statistics" in checked
    report = json.loads(next(line for line in checked.splitlines() if line.startswith("{")))
    assert report["passed"] and report["segments"] == 4 and report["hvp_relative_error"] < 1e-5
    half = [*settings, "--dtype", "bfloat16"]
    refused = call(capsys, ["check", "curvature", "--model", str(tmp_path / "resnet"), *half])
    assert_refused(refused, 5, "model", "9 layer(s) of batch normalisation in bfloat16", "set model.dtype to float32")
    tiny_classifier("vit").save_pretrained(tmp_path / "vit")
    for path in (digits / "model", tmp_path / "vit"):
        assert '"passed": true' in succeed(capsys, ["check", "curvature", "--model", str(path), *half]).out


def test_mistakes_are_refused_before_anything_starts(digits, tmp_path, capsys):
    output = f"output={tmp_path / 'out'}"

    def refuse(code, kind, *texts, overrides):
        stop = "solver.stop.forget_matches_holdout=false"
        assert_refused(call(capsys, arguments(digits, "run", output, stop, *overrides)), code, kind, *texts)
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.json"))

    refuse(4, "data", "1 unknown class(es)", overrides=["forget={classes: [11]}"])
    refuse(3, "configuration", "3 names for a checkpoint of 10 classes",
           overrides=["forget={classes: [1]}", "data.label_names=[a, b, c]"])  # fmt: skip
    refuse(3, "configuration", "needs data.format image", overrides=["forget={classes: [1]}", "data.format=text"])
    refuse(3, "configuration", "classes select records of a classifier",
           overrides=["forget={classes: [1]}", "model.task=causal_lm", "data.format=text"])  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"image": [[0] * 8] * 8, "label": label}) + "\n" for label in (3, 9, 10)), encoding="utf-8"
    )
    rows = [f"data.path={tmp_path / 'rows.jsonl'}", "data.split=train", "holdout=null", "objective.name=retain"]
    refuse(4, "data", "a label '10' in record 'row-2'", overrides=["forget={classes: [3]}", *rows])
    (digits / "model" / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    try:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"image": [[0] * 9] * 8, "label": 3}) + "\n", encoding="utf-8")
        refuse(4, "data", "an image of 8 x 9 pixels in record 'row-0'", overrides=["forget={classes: [3]}", *rows])
    finally:
        (tmp_path / "preprocessor_config.json").rename(digits / "model" / "preprocessor_config.json")


def test_a_family_without_segments_runs_below_stage_3_alone(digits, tmp_path, capsys):
    """A network of one stage, which would be its own only block."""
    config = AutoConfig.for_model(
        "resnet", num_channels=1, embedding_size=3, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=10
    )
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    base = [f"model.path={tmp_path / 'model'}", "forget={classes: [3]}", "objective.name=retain", solver("krylov")]
    refused = call(capsys, arguments(digits, "run", *base, f"output={tmp_path / 'out'}"))
    assert_refused(refused, 5, "model", "cannot be cut into segments (no ModuleList of layers) at ZeRO stage 3")
    done = succeed(capsys, arguments(digits, "run", *base, f"output={tmp_path / 'out'}", "cluster.zero_stage=2"))
    assert "warning: the whole model is one segment: no ModuleList of layers" in done.out
