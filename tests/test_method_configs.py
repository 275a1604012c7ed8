"""Methods by their names: what each stands for, which minibatches it draws, and whose settings it refuses."""

import pytest

from distributed_unlearn.config import JobConfig, ObjectiveConfig, ScrubConfig, parse_job
from distributed_unlearn.config.methods import RoleDraws
from distributed_unlearn.config.solver import all_methods, methods_with, stepping_methods
from distributed_unlearn.errors import ConfigError

JOB = {
    "model": {"path": "model"},
    "data": {"path": "records.jsonl"},
    "forget": {"subjects": ["a"]},
    "holdout": {"subjects": ["b"]},
    "output": "out",
}
OBJECTIVES = {
    "gradient_descent": "retain",
    "gradient_ascent": "gradient_ascent",
    "graddiff": "graddiff",
    "random_labels": "random_labels",
    "npo": "npo",
    "simnpo": "simnpo",
    "undial": "undial",
    "delete": "delete",
    "scrub": "scrub",
    "rmu": "rmu",
}


@pytest.mark.parametrize(("method", "objective"), OBJECTIVES.items())
def test_a_name_brings_its_objective_along(method, objective):
    job = parse_job({**JOB, "solver": {"method": method}, "objective": {"retain_weight": 2.0}}, "test")
    assert job.objective.name == objective and job.objective.retain_weight == 2.0
    assert job.solver.method == method and job.solver.learning_rate == 2e-4
    assert JobConfig.model_validate(job.model_dump(mode="json")) == job
    with pytest.raises(ConfigError, match=f"solver.method {method} minimises the objective {objective}, not token_"):
        parse_job({**JOB, "solver": {"method": method}, "objective": {"name": "token_matched"}}, "test")


@pytest.mark.parametrize("method", all_methods())
def test_another_methods_settings_are_refused(method):
    foreign = {
        "momentum": 0.5,
        "damping": 1.0,
        "cutoff": 0.1,
        "inner": "krylov",
        "epochs": 2,
        "forget_cycles": 3,
        "layer": 1,
    }
    for key, value in foreign.items():
        if method in methods_with(key):
            continue
        with pytest.raises(ConfigError, match=f"solver.{key}: .* it belongs to solver.method {methods_with(key)[0]}"):
            parse_job({**JOB, "solver": {"method": method, key: value}}, "test")


def test_another_objectives_settings_are_refused():
    for key, value in {"beta": 0.3, "penalty": "squared", "undial_strength": 3.0, "distillation_weight": 2.0}.items():
        with pytest.raises(ValueError, match=f"{key} belongs to .*, not to retain"):
            ObjectiveConfig(name="retain", **{key: value})
    for name in ("scrub", "rmu"):
        with pytest.raises(ValueError, match=f"retain is fixed for {name}"):
            ObjectiveConfig(name=name, retain="kl")


def test_what_only_one_method_can_do_is_refused_of_others():
    with pytest.raises(ConfigError, match="objective scrub takes turns that only solver.method scrub takes"):
        parse_job({**JOB, "objective": {"name": "scrub"}}, "test")
    with pytest.raises(ConfigError, match="objective rmu looks at a layer that only solver.method rmu names"):
        parse_job({**JOB, "objective": {"name": "rmu"}}, "test")
    with pytest.raises(ConfigError, match="retrain without data.base_model"):
        parse_job({**JOB, "solver": {"method": "retrain"}}, "test")
    based = {**JOB, "data": {**JOB["data"], "base_model": "base"}, "solver": {"method": "retrain"}}
    for method in ("retrain", "ssd"):
        with pytest.raises(ConfigError, match=f"solver.method {method} has no objective; remove it"):
            parse_job({**based, "solver": {"method": method}, "objective": {"name": "retain"}}, "test")
    job = parse_job({**based, "holdout": None}, "test")
    assert job.trains and "retrain" not in stepping_methods()
    assert JobConfig.model_validate(job.model_dump(mode="json")) == job
    with pytest.raises(ConfigError, match="training needs a whole GPU"):
        parse_job({**based, "cluster": {"gpus_per_worker": 0.5, "zero_stage": 2}}, "test")


def test_descents_and_ascents_take_turns():
    """Each role's minibatches are drawn one after the other, without a gap, so that an epoch visits every record."""
    solver = ScrubConfig(method="scrub", retain_steps=2, forget_steps=1, forget_cycles=2)
    draws = [solver.draws_at(step) for step in range(9)]
    assert draws == [
        RoleDraws(None, 0),
        RoleDraws(None, 1),
        RoleDraws(0, None),
        RoleDraws(None, 2),
        RoleDraws(None, 3),
        RoleDraws(1, None),
        RoleDraws(None, 4),
        RoleDraws(None, 5),
        RoleDraws(None, 6),
    ]
