"""Published methods by their names, through the whole command: on a language model, on images, in rounds, refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import assert_refused, call, succeed
from safetensors.torch import load_file, save_file
from tiny_job import TinyJob
from transformers import ViTImageProcessor

from distributed_unlearn.models.cnn import TwoLayerCNNConfig, TwoLayerCNNForImageClassification

pytestmark = pytest.mark.usefixtures("quick")

NO_STOP = "stop: {forget_matches_holdout: false}"
STEPS = f"gradient_batch: 6, max_steps: 2, learning_rate: 0.001, {NO_STOP}"
METHODS = {
    "gradient_descent": f"{{method: gradient_descent, {STEPS}}}",
    "gradient_ascent": f"{{method: gradient_ascent, {STEPS}}}",
    "graddiff": f"{{method: graddiff, {STEPS}}}",
    "random_labels": f"{{method: random_labels, {STEPS}}}",
    "npo": f"{{method: npo, {STEPS}}}",
    "simnpo": f"{{method: simnpo, {STEPS}}}",
    "undial": f"{{method: undial, {STEPS}}}",
    "delete": f"{{method: delete, {STEPS}}}",
    "scrub": f"{{method: scrub, retain_steps: 1, {STEPS}}}",
}
LANGUAGE_ONLY = {"rmu": f"{{method: rmu, layer: 0, {STEPS}}}"}
TRAINING = "epochs: 2, batch_size: 4, learning_rate: 0.003"
RETRAIN = f"solver={{method: retrain, {TRAINING}}}"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A job on 60 digits that forgets two classes with the paper's CNN; returns its file."""
    folder = tmp_path_factory.mktemp("digits")
    config = TwoLayerCNNConfig(
        image_size=8, first_channels=3, second_channels=4, id2label={number: str(number) for number in range(10)}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TwoLayerCNNForImageClassification(config).save_pretrained(folder / "model")
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(folder / "model")
    job = {
        "model": {"path": str(folder / "model"), "task": "image_classification"},
        "data": {"path": "sklearn:digits", "split": "train[:60]", "format": "image"},
        "forget": {"classes": [3, 7]},
        "holdout": {"path": "sklearn:digits", "split": "train[60:80]"},
        "cluster": {"backend": "in_process", "num_workers": 1, "zero_stage": 3, "use_gpu": "never"},
        "output": "-",
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return folder / "job.yaml"


def language(tiny: TinyJob, command: str, output: Path, *overrides: str) -> list[str]:
    """The tiny job without the objective and the solver that it names."""
    return [command, *tiny.run(output, "objective={}", *overrides)[1:]]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def shaken(tiny: TinyJob, folder: Path) -> Path:
    """A checkpoint beside the job's own, whose weights are others: a base model."""
    base = tiny.copy_model(folder)
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    moved = {name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(moved, base / "model.safetensors", {"format": "pt"})
    return base


def distance(first: Path, second: Path) -> float:
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    return math.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in a))


@pytest.mark.parametrize("method", METHODS)
def test_on_a_language_model(method, tiny: TinyJob, tmp_path, capsys):
    succeed(capsys, language(tiny, "run", tmp_path / "out", f"solver={METHODS[method]}"))
    record = record_of(tmp_path / "out")
    (found,) = record["rounds"]
    assert record["config"]["solver"]["method"] == method and found["num_steps"] == 2 and found["update_norm"] > 0
    if method == "scrub":  # a descent, then an ascent, each on records of one role
        assert [sorted(step["terms"]) for step in found["steps"]] == [
            ["retain_loss_nats_per_token", "retain_term"],
            ["forget_distance_nats", "forget_loss_nats_per_token", "forget_term"],
        ]
        assert found["steps"][1]["loss"] < 0  # away from the teacher, which the descent has left
    if method == "random_labels":  # tokens that nobody predicted: dearer than the true ones at a uniform model
        assert found["steps"][1]["terms"]["forget_term"] < found["steps"][0]["terms"]["forget_term"]


def test_steering_a_layer_of_a_language_model(tiny: TinyJob, tmp_path, capsys):
    trainable = 'model.trainable=["*.layers.*.down_proj.weight"]'
    steering = (f"solver={LANGUAGE_ONLY['rmu']}", "objective.retain_weight=10", trainable)
    succeed(capsys, language(tiny, "run", tmp_path / "out", *steering))
    (found,) = record_of(tmp_path / "out")["rounds"]
    assert [sorted(step["terms"]) for step in found["steps"]] == [["forget_term", "retain_term"]] * 2
    first, second = (step["terms"] for step in found["steps"])
    assert second["forget_term"] < first["forget_term"] and first["retain_term"] == 0.0 < second["retain_term"]
    before, after = (load_file(path / "model.safetensors") for path in (tiny.model, tmp_path / "out" / "checkpoint"))
    assert [n for n in before if not before[n].equal(after[n])] == ["model.layers.0.mlp.down_proj.weight"]


def test_what_steering_refuses(tiny: TinyJob, digits: Path, tmp_path, capsys):
    for command in ("plan", "run"):
        far = language(tiny, command, tmp_path / "out", f"solver={{method: rmu, layer: 2, {STEPS}}}")
        assert_refused(call(capsys, far), 3, "configuration", "solver.layer 2", "a layer from 0 to 1")
    images = ["run", str(digits), f"solver={LANGUAGE_ONLY['rmu']}", f"output={tmp_path / 'out'}"]
    assert_refused(call(capsys, images), 3, "configuration", "hidden states of a causal language model")


def test_the_teacher_is_the_start_of_the_round(tiny: TinyJob, tmp_path, capsys):
    """Of each round its own: at the first step of either the student is its teacher, and no divergence is left."""
    rounds = ("forget=null", "rounds=[{subjects: [person-0000]}, {record_ids: [person-0001-00]}]")
    succeed(capsys, language(tiny, "run", tmp_path / "out", f"solver={METHODS['scrub']}", *rounds))
    first, second = record_of(tmp_path / "out")["rounds"]
    for found in (first, second):
        descent = found["steps"][0]["terms"]
        assert descent["retain_term"] == pytest.approx(descent["retain_loss_nats_per_token"], abs=1e-5)
        assert found["steps"][1]["terms"]["forget_term"] < -1e-4  # the descent has left the teacher
    assert second["before"]["forget_round_1"] == first["after"]["forget"]


@pytest.mark.parametrize("method", METHODS)
def test_on_images(method, digits: Path, tmp_path, capsys):
    overrides = (f"solver={METHODS[method]}", f"output={tmp_path / 'out'}")
    succeed(capsys, ["run", str(digits), *overrides])
    (found,) = record_of(tmp_path / "out")["rounds"]
    assert found["num_steps"] == 2 and found["update_norm"] > 0 and found["num_forget_records"] == 11


def test_retraining_is_a_training_that_leaves_records_out(tiny: TinyJob, tmp_path, capsys):
    """The same checkpoint, bit for bit; the update is measured from the model that had to forget."""
    base = shaken(tiny, tmp_path / "base")
    outcome = succeed(capsys, language(tiny, "run", tmp_path / "out", RETRAIN, f"data.base_model={base}"))
    train = (f"model.path={base}", f"train={{{TRAINING}, exclude_forget: true}}")
    succeed(capsys, language(tiny, "run", tmp_path / "trained", *train))
    record, trained = record_of(tmp_path / "out"), record_of(tmp_path / "trained")
    checkpoints = [tmp_path / name / "checkpoint" for name in ("out", "trained")]
    assert distance(*checkpoints) == 0.0
    (found,) = record["rounds"]
    assert found["after"]["forget"] == trained["training"]["scores"]["forget"]
    assert found["update_norm"] == pytest.approx(distance(checkpoints[0], tiny.model), rel=1e-5)
    survival = record["surviving_update"]
    assert survival["update_norm"] == pytest.approx(found["update_norm"], rel=1e-5)
    assert found["num_steps"] == 2 * math.ceil(found["num_retain_records"] / 4) and found["steps"] == []
    assert found["num_products"] == 0 and record["curvature_mode"] is None
    assert record["verdict"] is not None and record["erased_ids_sha256_salted"]
    assert "round 1: retrained: 2 epoch(s) of 9 retain records" in outcome.out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "retrain: 6 steps, 0 products" in page and "on the objective" not in page


def test_every_round_retrains_from_the_base(tiny: TinyJob, tmp_path, capsys):
    """After two rounds: the model that was trained without both, not a retraining of the first round's result."""
    base = shaken(tiny, tmp_path / "base")
    rounds = ("forget=null", "rounds=[{subjects: [person-0000]}, {record_ids: [person-0001-00]}]")
    succeed(capsys, language(tiny, "run", tmp_path / "two", RETRAIN, f"data.base_model={base}", *rounds))
    both = "forget={subjects: [person-0000], record_ids: [person-0001-00]}"
    succeed(capsys, language(tiny, "run", tmp_path / "one", RETRAIN, f"data.base_model={base}", both))
    assert distance(tmp_path / "two" / "checkpoint", tmp_path / "one" / "checkpoint") == 0.0
    first, second = record_of(tmp_path / "two")["rounds"]
    assert second["before"]["forget_round_1"] == first["after"]["forget"]
    assert [item["num_retain_records"] for item in (first, second)] == [9, 8]


def test_retraining_on_images_and_partly_frozen(digits: Path, tmp_path, capsys):
    model = str(digits.parent / "model")
    overrides = (RETRAIN, f"data.base_model={model}", 'model.trainable=["*classifier*"]', f"output={tmp_path / 'out'}")
    succeed(capsys, ["run", str(digits), *overrides])
    before, after = (
        load_file(Path(model) / "model.safetensors"),
        load_file(tmp_path / "out/checkpoint/model.safetensors"),
    )
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if "classifier" in name}
    (found,) = record_of(tmp_path / "out")["rounds"]
    assert found["update_norm"] == pytest.approx(
        distance(digits.parent / "model", tmp_path / "out/checkpoint"), rel=1e-5
    )


SSD = "solver={method: ssd, selection_weighting: 1.5, dampening_constant: 0.5}"


def test_dampening_a_language_model(tiny: TinyJob, tmp_path, capsys):
    """One change, without steps; what it left alone is there bit for bit."""
    outcome = succeed(capsys, language(tiny, "run", tmp_path / "out", SSD, "holdout=null"))
    record = record_of(tmp_path / "out")
    (found,) = record["rounds"]
    assert found["num_steps"] == 1 and found["steps"] == [] and record["curvature_mode"] is None
    before, after = (load_file(path / "model.safetensors") for path in (tiny.model, tmp_path / "out" / "checkpoint"))
    changed = sum(int((before[name] != after[name]).sum()) for name in before)
    assert 0 < changed < sum(value.numel() for value in before.values()) / 2
    assert f"round 1: dampened: {changed} weights" in outcome.out
    assert all((after[name].abs() <= before[name].abs()).all() for name in before)
    assert found["update_norm"] == pytest.approx(distance(tmp_path / "out" / "checkpoint", tiny.model), rel=1e-5)
    assert "ssd: 1 steps, 0 products" in (tmp_path / "out" / "report.html").read_text()


def test_a_fresh_adapter_has_nothing_to_dampen(tiny: TinyJob, tmp_path, capsys):
    """Its B is zero, and with it the gradient of A: no weight changes, and none is said to."""
    adapter = "model.adapter={name: lora, rank: 2, alpha: 4, target_modules: [q_proj]}"
    outcome = succeed(capsys, language(tiny, "run", tmp_path / "out", SSD, adapter))
    assert "round 1: dampened: 0 weights" in outcome.out
    assert record_of(tmp_path / "out")["rounds"][0]["update_norm"] == 0.0


def test_dampening_images_in_rounds(digits: Path, tmp_path, capsys):
    """From a sample of the retain set; another seed draws another one."""
    rounds = ("forget=null", "rounds=[{classes: [3]}, {record_ids: [digit-0001, digit-0002]}]")
    norms = []
    for seed in (0, 1):
        solver = f"solver={{method: ssd, selection_weighting: 1.5, max_retain_records: 5, seed: {seed}}}"
        succeed(capsys, ["run", str(digits), *rounds, solver, f"output={tmp_path / str(seed)}"])
        first, second = record_of(tmp_path / str(seed))["rounds"]
        assert first["update_norm"] > 0 and second["update_norm"] > 0
        assert second["before"]["forget_round_1"] == first["after"]["forget"]
        norms.append(first["update_norm"])
    assert norms[0] != norms[1]


def test_a_threshold_that_no_weight_can_reach_is_refused(tiny: TinyJob, tmp_path, capsys):
    """3 of 12 records are forgotten: their importance is at most four times that of all data."""
    for command in ("plan", "run"):
        outcome = call(capsys, language(tiny, command, tmp_path / "out", "solver={method: ssd}"))
        assert_refused(outcome, 3, "configuration", "selection_weighting 10 in round 1", "1 of 4 records", "below 4")
    outcome = succeed(capsys, language(tiny, "plan", tmp_path / "out", SSD))
    assert "gradients a round" in outcome.out and "12" in outcome.out.partition("gradients a round")[2].split("\n")[0]


def test_plan_of_every_method(tiny: TinyJob, tmp_path, capsys):
    """A teacher's pass is a forward pass more of every step; a retraining is a training."""
    moved = {}
    for method, settings in {**METHODS, **LANGUAGE_ONLY}.items():
        outcome = succeed(
            capsys, language(tiny, "plan", tmp_path / "out", f"solver={settings}", "cluster.num_workers=1")
        )
        (line,) = [line for line in outcome.out.splitlines() if "communication a round" in line]
        moved[method] = float(line.partition("communication a round")[2].replace("│", " ").split()[0])
        assert "at most 0" in outcome.out
    taught = ("undial", "delete", "scrub")
    assert all((moved[method] > moved["npo"]) == (method in taught) for method in METHODS)
    assert moved["rmu"] < moved["undial"]  # one layer of two, though with a teacher's pass
    outcome = succeed(capsys, language(tiny, "plan", tmp_path / "out", RETRAIN, f"data.base_model={tiny.model}"))
    assert "optimizer states" in outcome.out and "training steps" in outcome.out and "trains anew" in outcome.out
    assert not (tmp_path / "out").exists()


def test_what_a_retraining_refuses(tiny: TinyJob, tmp_path, capsys):
    def refused(*overrides: str) -> Any:
        return call(capsys, language(tiny, "run", tmp_path / "out", RETRAIN, *overrides))

    assert_refused(refused(), 3, "configuration", "retrain without data.base_model")
    based = f"data.base_model={tiny.model}"
    assert_refused(refused(based, "objective.name=retain"), 3, "configuration", "has no objective")
    assert_refused(refused(f"data.base_model={tmp_path / 'nowhere'}"), 5, "model", "nowhere")
    adapter = "model.adapter={name: lora, rank: 2, alpha: 2, target_modules: [q_proj]}"
    assert_refused(refused(based, adapter), 3, "configuration", "retrain with an adapter", "train.exclude_forget")
    other = tiny.copy_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    names = list(vocabulary)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = refused(f"data.base_model={other}")
    assert_refused(outcome, 5, "model", "a base model", "with another tokenizer", "correct data.base_model")
    assert not (tmp_path / "out" / "checkpoint").exists()
