"""Every objective, solver and curvature setting of the job file takes a step, and does what its name says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command_line import Outcome, assert_refused, call, succeed
from safetensors.torch import load_file, save_file
from tiny_job import TinyJob, first_order

NO_STOP = "solver.stop.forget_matches_holdout=false"
pytestmark = pytest.mark.usefixtures("quick")


def _one_step(tiny: TinyJob, capsys, output: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any], Outcome]:
    outcome = succeed(capsys, tiny.run(output, "solver.max_steps=1", *overrides))
    record = json.loads((output / "record.json").read_text())
    (step,) = record["rounds"][0]["steps"]
    assert math.isfinite(step["loss"]) and step["gradient_norm"] > 0
    return record, step, outcome


def _change(record: dict[str, Any], name: str) -> float:
    last = record["rounds"][-1]
    return last["after"][name]["loss_nats_per_token"] - last["before"][name]["loss_nats_per_token"]


@pytest.mark.parametrize(
    ("objective", "sign"),
    [
        ("retain", 0),
        ("graddiff", 1),
        ("npo", 1),
        ("simnpo", 1),
        ("gradient_ascent", 1),
        ("holdout_matched", 0),
        ("token_matched", 0),
        ("undial", 0),
        ("delete", 0),
    ],
)
def test_every_objective_takes_a_cubic_step(objective, sign, tiny: TinyJob, tmp_path, capsys):
    weight = 1.0 if sign == 0 else 0.01  # random weights: what helps one set helps both
    overrides = (f"objective.name={objective}", f"objective.retain_weight={weight}")
    record, step, _ = _one_step(tiny, capsys, tmp_path / "out", *overrides)
    assert record["config"]["objective"]["name"] == objective
    assert step["num_products"] == 2 and step["predicted_reduction"] > 0
    assert step["accepted"] and step["actual_reduction"] > 0 and record["rounds"][0]["update_norm"] > 0
    assert sign == 0 or _change(record, "forget") > 0
    assert objective != "retain" or _change(record, "retain") < 0


def test_the_defaults_take_steps(tiny: TinyJob, tmp_path, capsys):
    """Preconditioned gradient, then gradient and last step; the target is measured in the objective's own terms."""
    overrides = (
        "objective={}",
        "curvature={}",
        "solver={gradient_batch: 6, curvature_batch: 4, max_steps: 3, stop: {forget_matches_holdout: false}}",
    )
    outcome = succeed(capsys, tiny.run(tmp_path / "out", *overrides))
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["config"]["objective"]["name"] == "token_matched" and outcome.code in (0, 10)
    steps = record["rounds"][0]["steps"]
    assert [step["num_products"] for step in steps] == [1, 2, 2] and all(step["accepted"] for step in steps)
    assert steps[-1]["terms"]["forget_term"] < steps[0]["terms"]["forget_term"]


def test_targets_by_rank_follow_the_tokens(tiny: TinyJob, tmp_path, capsys):
    """The first step is the same; afterwards tokens have overtaken others, and their targets are other ones."""
    losses = []
    for order in ("start", "refreshed"):
        overrides = ("objective.name=token_matched", f"objective.order={order}", first_order("adamw", 1e-2, 3))
        succeed(capsys, tiny.run(tmp_path / order, *overrides))
        steps = json.loads((tmp_path / order / "record.json").read_text())["rounds"][0]["steps"]
        losses.append([step["loss"] for step in steps])
    assert losses[0][0] == losses[1][0] and losses[0][2] != losses[1][2]


def test_targets_from_the_base_model(tiny: TinyJob, tmp_path, capsys):
    """No holdout set: every forget token is to be as likely as in another checkpoint."""
    base = tiny.copy_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name: 1.3 * value for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    token = ("objective.name=token_matched", "objective.target_from=base_model", "holdout=null", NO_STOP)
    _, step, _ = _one_step(tiny, capsys, tmp_path / "out", *token, f"data.base_model={base}")
    assert step["accepted"] and step["terms"]["forget_term"] > 0 and step["terms"]["retain_term"] < 1e-9
    # The checkpoint itself as its own base: every token is where it is to go.
    same = (*token, f"data.base_model={tiny.model}", "objective.retain=loss")
    _, step, _ = _one_step(tiny, capsys, tmp_path / "same", *same)
    assert step["terms"]["forget_term"] < 1e-9
    refused = call(capsys, tiny.run(tmp_path / "no", *token))
    assert_refused(refused, 3, "configuration", "target_from base_model without data.base_model")


def test_methods_without_curvature_say_so(tiny: TinyJob, tmp_path, capsys):
    overrides = (first_order("adamw", 1e-3), "objective.name=retain")
    record, step, outcome = _one_step(tiny, capsys, tmp_path / "out", *overrides)
    assert (step["alpha"], step["cubic_coefficient"], step["num_products"]) == (None, None, 0)
    assert record["curvature_mode"] == {"cached": None, "cached_gib": 0.0}
    assert "first-order: none" in outcome.out
    # AdamW's first step moves every weight by the learning rate, whatever its gradient (padding's row excepted).
    num_parameters = 32 * 320 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 64) + 32
    assert record["rounds"][0]["update_norm"] == pytest.approx(1e-3 * math.sqrt(num_parameters), rel=0.05)


def test_sgd_moves_by_rate_times_gradient(tiny: TinyJob, tmp_path, capsys):
    record, step, _ = _one_step(tiny, capsys, tmp_path / "out", first_order("sgd", 1e-3))
    assert record["rounds"][0]["update_norm"] == pytest.approx(1e-3 * step["gradient_norm"], rel=1e-4)


def test_subspace_steps_in_adams_metric(tiny: TinyJob, tmp_path, capsys):
    overrides = ("solver.inner=subspace", "solver.metric=adam", "solver.subspace_gradient=by_role")
    succeed(capsys, tiny.run(tmp_path / "out", *_without_krylov(), *overrides, "curvature.product=gauss_newton"))
    steps = json.loads((tmp_path / "out" / "record.json").read_text())["rounds"][0]["steps"]
    assert [step["num_products"] for step in steps] == [2, 3] and all(step["accepted"] for step in steps)
    assert all(step["num_krylov_steps"] == 0 and step["residual"] is None for step in steps)
    # alpha is a length in the metric, the update norm is Euclidean
    assert all(step["alpha"] > 0 and step["update_norm"] != pytest.approx(step["alpha"], rel=1e-2) for step in steps)


def _without_krylov() -> tuple[str, ...]:
    return ("solver={gradient_batch: 6, curvature_batch: 4, max_steps: 2, stop: {forget_matches_holdout: false}}",)


@pytest.mark.parametrize("method", ["curenewton", "damped_newton", "pinv_newton"])
def test_newton_methods_take_a_step(method, tiny: TinyJob, tmp_path, capsys):
    """The norms alone: 160 entries, so that a Hessian can be written down."""
    batches = "gradient_batch: 6, curvature_batch: 6, max_steps: 1, stop: {forget_matches_holdout: false}"
    overrides = (f"solver={{method: {method}, {batches}}}", 'model.trainable=["*norm*"]', "objective.name=retain")
    outcome = call(capsys, tiny.run(tmp_path / "out", *overrides))
    assert outcome.code in (0, 10), outcome.err  # a step without control may end in a verdict that it is not good
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    (step,) = record["rounds"][0]["steps"]
    assert step["accepted"] and step["update_norm"] > 0 and step["num_krylov_steps"] == 0
    assert step["num_products"] == 160 if method != "damped_newton" else 1 <= step["num_products"] <= 50
    fields = {"curenewton": ("alpha", "gamma", "cubic_coefficient"), "damped_newton": ("gamma",), "pinv_newton": ()}
    shown = {name for name in ("alpha", "gamma", "cubic_coefficient") if step[name] is not None}
    assert shown == set(fields[method]) and record["config"]["solver"]["method"] == method


def test_a_hessian_that_is_too_large_is_refused(tiny: TinyJob, tmp_path, capsys):
    settings = "solver={method: curenewton, gradient_batch: 6, curvature_batch: 4}"
    for command in ("plan", "run"):
        outcome = call(capsys, [command, *tiny.run(tmp_path / "out", settings)[1:]])
        assert_refused(outcome, 3, "configuration", "trainable parameters for an explicit Hessian", "max_parameters")
        assert not (tmp_path / "out" / "checkpoint").exists()


def test_inner_gradient_descent(tiny: TinyJob, tmp_path, capsys):
    overrides = ("solver.inner=gradient_descent", "solver.inner_steps=3", "solver.max_rejections=0")
    _, step, _ = _one_step(tiny, capsys, tmp_path / "out", *overrides)
    assert step["num_products"] == 3 and step["num_krylov_steps"] == 0 and step["smallest_ritz_value"] is None


def test_fixed_coefficient_never_moves(tiny: TinyJob, tmp_path, capsys):
    overrides = ("solver.adaptive=false", "solver.cubic_coefficient=400")
    succeed(capsys, tiny.run(tmp_path / "out", *overrides, "solver.max_steps=3"))
    steps = json.loads((tmp_path / "out" / "record.json").read_text())["rounds"][0]["steps"]
    assert [step["cubic_coefficient"] for step in steps] == [400.0] * 3
    assert all(step["accepted"] and step["num_rejections"] == 0 for step in steps)


def test_gauss_newton_is_positive(tiny: TinyJob, tmp_path, capsys):
    overrides = ("objective.name=retain", "solver.max_krylov_steps=5")
    smallest = []
    for product in ("hessian", "gauss_newton"):
        _, step, _ = _one_step(tiny, capsys, tmp_path / product, *overrides, f"curvature.product={product}")
        smallest.append(step["smallest_ritz_value"])
    assert smallest[1] > -1e-4 and smallest[0] != pytest.approx(smallest[1], rel=1e-2)


def test_cached_products_equal_recomputed_ones(tiny: TinyJob, tmp_path, capsys):
    norms = {}
    for mode in ("recompute", "cached"):
        record, step, outcome = _one_step(tiny, capsys, tmp_path / mode, f"curvature.mode={mode}")
        assert record["curvature_mode"]["cached"] is (mode == "cached") and f"({mode})" in outcome.out
        norms[mode] = (step["largest_ritz_value"], step["alpha"], record["rounds"][0]["update_norm"])
    assert norms["cached"] == pytest.approx(norms["recompute"], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 2])
def test_stage_and_micro_batch_do_not_change_the_result(stage, tiny: TinyJob, tmp_path, capsys):
    found = []
    for name, overrides in (("a", ()), ("b", (f"cluster.zero_stage={stage}", "curvature.micro_batch_size=2"))):
        record, step, _ = _one_step(tiny, capsys, tmp_path / name, *overrides)
        found.append((step["loss"], step["gradient_norm"], step["alpha"], record["rounds"][0]["update_norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_trainable_patterns_leave_the_rest_alone(tiny: TinyJob, tmp_path, capsys):
    from safetensors.torch import load_file

    _one_step(tiny, capsys, tmp_path / "out", 'model.trainable=["*.mlp.down_proj.weight"]')
    before = load_file(tiny.model / "model.safetensors")
    after = load_file(tmp_path / "out" / "checkpoint" / "model.safetensors")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}


def test_curvature_check(tiny: TinyJob, capsys, monkeypatch):
    arguments = ["check", "curvature", "--model", str(tiny.model), "--backend", "in_process"]
    arguments += ["--dtype", "float64", "--sequence-length", "12", "--batch-size", "2"]
    outcome = succeed(capsys, arguments)
    report = json.loads(outcome.out.strip().splitlines()[-1])
    assert report["passed"] and report["hvp_relative_error"] < 1e-10 and report["reference"] == "double_backward"

    import distributed_unlearn.commands.check as command

    monkeypatch.setattr(command, "tolerance_for", lambda dtype, reference: command.Tolerance(1.0, 0.0, 1.0))
    outcome = call(capsys, arguments)
    assert_refused(outcome, 9, "check", "hvp_relative_error", "at most 0")
    assert not json.loads(outcome.out.strip().splitlines()[-1])["passed"]
