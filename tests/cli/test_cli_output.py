"""The output folder after failures, replacements and roundings: complete or absent, and never silently useless."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, call, succeed
from safetensors.torch import load_file, save_file
from tiny_job import TinyJob, first_order, save_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("quick")


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def _assert_no_result(output: Path) -> None:
    names = sorted(path.name for path in output.iterdir())
    assert set(names) <= {"metrics.jsonl", "tensorboard"}, names


def test_weights_with_nan_are_refused(tiny: TinyJob, tmp_path, capsys):
    model = tiny.copy_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    outcome = call(capsys, tiny.run(tmp_path / "out", f"model.path={model}"))
    assert_refused(outcome, 7, "numerics", "NaN", "use an intact checkpoint")
    _assert_no_result(tmp_path / "out")


@pytest.mark.parametrize("max_steps", [1, 3], ids=["found_at_the_end", "found_in_a_step"])
def test_numbers_that_explode_are_refused(max_steps, tiny: TinyJob, tmp_path, capsys):
    # Of the whole model such a step leaves finite nonsense: the norms divide it away.
    overrides = ('model.trainable=["*.mlp.*"]', first_order("sgd", 1e36, max_steps))
    outcome = call(capsys, tiny.run(tmp_path / "out", *overrides))
    assert_refused(outcome, 7, "numerics", *(["at step 2 of round 1"] if max_steps == 3 else []))
    _assert_no_result(tmp_path / "out")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert kinds[:2] == ["model", "round_1/step"]  # what happened until then is kept


def test_a_training_that_explodes_ends_before_the_optimiser_takes_another_step(
    tiny: TinyJob, tmp_path, capsys, monkeypatch
):
    from distributed_unlearn.engine.optimizer import AdamW

    updated, own = [], AdamW.step

    def step(optimizer: AdamW) -> None:
        updated.extend(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        own(optimizer)

    monkeypatch.setattr(AdamW, "step", step)
    training = "train={epochs: 3, batch_size: 6, learning_rate: 1.0e+30, warmup_share: 0.0}"
    overrides = ("forget=null", 'model.trainable=["*.mlp.*"]', training)  # of the whole model the norms divide it away
    outcome = call(capsys, tiny.run(tmp_path / "out", *overrides))
    assert_refused(outcome, 7, "numerics", "a training loss of nan at step 2", "no checkpoint was written")
    assert updated and len(updated) == len(set(updated))  # each weight once, by the step before
    _assert_no_result(tmp_path / "out")


def test_a_bfloat16_training_does_not_depend_on_the_stage(tiny: TinyJob, tmp_path, capsys):
    training = ("forget=null", "model.dtype=bfloat16", "train={epochs: 2, batch_size: 6, learning_rate: 1.0e-3}")
    for stage in (0, 2):
        succeed(capsys, tiny.run(tmp_path / str(stage), *training, f"cluster.zero_stage={stage}"))
    first, second = (load_file(tmp_path / str(stage) / "checkpoint" / "model.safetensors") for stage in (0, 2))
    assert all(torch.equal(first[key], second[key]) for key in first | second)


def test_a_gradient_that_is_nan_is_refused_before_the_weights_change(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    from distributed_unlearn.engine.minibatch import MinibatchObjective
    from distributed_unlearn.engine.oracle import ShardedOracle

    changed = []
    compute = MinibatchObjective.gradient

    def spoil(self, gradient, *arguments, **settings):
        found = compute(self, gradient, *arguments, **settings)
        gradient[0] = float("nan")
        return found

    monkeypatch.setattr(MinibatchObjective, "gradient", spoil)
    monkeypatch.setattr(ShardedOracle, "candidate", lambda self, *values: changed.append(1))
    outcome = call(capsys, tiny.run(tmp_path / "out"))
    assert_refused(outcome, 7, "numerics", "gradient norm nan at step 1 of round 1")
    assert changed == []
    _assert_no_result(tmp_path / "out")


def test_more_workers_than_processors(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", refuse)
    output, many = tmp_path / "out", 4 * (os.cpu_count() or 1)
    outcome = call(capsys, tiny.run(output, "cluster.backend=ray", f"cluster.num_workers={many}"))
    assert_refused(outcome, 6, "resources", f"{many} workers of 1 CPU", "lower cluster.num_workers")
    assert not output.exists()


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_crash_while_writing_leaves_nothing(error, tiny: TinyJob, tmp_path, capsys, monkeypatch):
    written = []

    def crash(opened: object, base: object, folder: Path) -> None:
        written.extend(path.name for path in folder.iterdir())
        raise error

    monkeypatch.setattr("distributed_unlearn.engine.export.write_tokenizer", crash)
    arguments = tiny.run(tmp_path / "out", "solver.max_steps=1")
    if isinstance(error, KeyboardInterrupt):
        outcome = call(capsys, arguments)
        assert outcome.code == 130 and "interrupted" in outcome.err
    else:
        with pytest.raises(type(error)):
            call(capsys, arguments)
    assert "model.safetensors" in written
    _assert_no_result(tmp_path / "out")


def test_overwrite_replaces(tiny: TinyJob, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = tiny.run(output, "solver.max_steps=1")
    succeed(capsys, arguments)
    first, salt = _record(output), (output / "record.salt").read_text()
    (output / "checkpoint" / "left_over").write_text("old")
    (output / "pictures" / "round_7_gamma.svg").write_text("of a round that the next run does not have")
    assert_refused(call(capsys, arguments), 3, "configuration", "which exists")
    assert _record(output) == first
    succeed(capsys, [*arguments, "overwrite=true", "solver.max_steps=2"])
    second = _record(output)
    assert second["rounds"][0]["num_steps"] == 2
    assert second["result"]["files"] != first["result"]["files"]
    weights = output / "checkpoint" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == second["result"]["files"]["model.safetensors"]
    assert not (output / "checkpoint" / "left_over").exists()
    assert (output / "record.salt").read_text() != salt
    names = {path.name for path in (output / "pictures").iterdir()}
    assert {"memorisation.svg", "round_1_gamma.svg"} <= names and "round_7_gamma.svg" not in names
    kinds = [json.loads(line)["kind"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("round_1/step") == 2 and kinds.count("model") == 1  # of this run alone
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []


def test_a_failed_replacement_keeps_the_old(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    succeed(capsys, tiny.run(output, "solver.max_steps=1"))
    before = {path.name: path.read_bytes() for path in (output / "checkpoint").iterdir()}

    def crash(*arguments: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr("distributed_unlearn.engine.export.write_tokenizer", crash)
    with pytest.raises(RuntimeError, match="disk full"):
        call(capsys, tiny.run(output, "solver.max_steps=2", "overwrite=true"))
    assert {path.name: path.read_bytes() for path in (output / "checkpoint").iterdir()} == before
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []


@pytest.fixture(scope="module")
def bfloat16_model(tiny: TinyJob, tmp_path_factory) -> Path:
    model = tiny.copy_model(tmp_path_factory.mktemp("bfloat16") / "model")
    save_model(model, torch.bfloat16)
    return model


def test_rounding_to_bfloat16_is_warned_of(bfloat16_model: Path, tiny: TinyJob, tmp_path, capsys):
    """An update that the checkpoint's own dtype cannot hold: the files stay as they were, and we say so."""
    output = tmp_path / "out"
    tiny_step = (first_order("sgd", 1e-7), "save.fp32_master=true")
    outcome = succeed(capsys, tiny.run(output, f"model.path={bfloat16_model}", *tiny_step))
    assert "NOT IN THE FILES" in outcome.out and "bfloat16" in outcome.out and "save.dtype=float32" in outcome.out
    surviving = _record(output)["surviving_update"]
    assert surviving["dtype"] == "bfloat16" and surviving["update_norm"] > 0
    assert surviving["projection"] < 0.5 and surviving["share_of_changed_weights"] < 0.05
    saved = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    assert saved.dtype == torch.bfloat16
    # The fp32 weights beside it hold the whole update.
    master = AutoModelForCausalLM.from_pretrained(output / "checkpoint" / "fp32_master")
    assert master.dtype == torch.float32
    base = load_file(bfloat16_model / "model.safetensors")
    whole = master.state_dict()
    squared = sum(float((whole[name].double() - base[name].double()).square().sum()) for name in base)
    assert squared**0.5 == pytest.approx(surviving["update_norm"], rel=1e-3)


def test_no_warning_where_the_update_survives(bfloat16_model: Path, tiny: TinyJob, tmp_path, capsys):
    tiny_step = (first_order("sgd", 1e-7), "save.dtype=float32")
    outcome = succeed(capsys, tiny.run(tmp_path / "out", f"model.path={bfloat16_model}", *tiny_step))
    assert "NOT IN THE FILES" not in outcome.out
    surviving = _record(tmp_path / "out")["surviving_update"]
    # fp32 resolves about 1e-8 of weights near 0.1 and the update is a few 1e-8 each, so a little is rounded.
    assert surviving["projection"] == pytest.approx(1.0, abs=0.02)


def test_the_checkpoint_may_be_several_files(tiny: TinyJob, tmp_path, capsys):
    limit_gib = 4.5e-5  # a little more than the largest parameter
    succeed(capsys, tiny.run(tmp_path / "out", "solver.max_steps=1", f"save.max_shard_gib={limit_gib}"))
    checkpoint = tmp_path / "out" / "checkpoint"
    files = [load_file(path) for path in sorted(checkpoint.glob("model-*-of-*.safetensors"))]
    assert len(files) > 1 and (checkpoint / "model.safetensors.index.json").exists()
    for tensors in files:
        assert sum(value.numel() * 4 for value in tensors.values()) <= limit_gib * 2**30
    opened = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    whole = {name: value for tensors in files for name, value in tensors.items()}
    assert all(torch.equal(opened[name], value) for name, value in whole.items())
    assert whole.keys() == load_file(tiny.model / "model.safetensors").keys()
