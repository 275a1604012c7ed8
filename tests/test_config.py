"""Job files are validated strictly: nothing unknown, nothing out of range, nothing rewritten."""

import copy
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from distributed_unlearn.config import JobConfig, load_job, parse_job
from distributed_unlearn.errors import ConfigError

JOBS = sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml"))
SMALLEST = {
    "model": {"path": "checkpoint"},
    "data": {"path": "records.jsonl"},
    "forget": {"subjects": ["person-0001"]},
    "holdout": {"record_ids": ["r1"]},
    "output": "runs/one",
}


def job(**sections):
    """The smallest job with sections replaced; None removes one."""
    tree = copy.deepcopy(SMALLEST) | sections
    return {key: value for key, value in tree.items() if value is not None}


def refuse(tree):
    with pytest.raises(ConfigError) as caught:
        parse_job(tree, "job.yaml")
    assert caught.value.exit_code == 3 and "job.yaml" in str(caught.value)
    return str(caught.value)


def test_smallest_job_and_its_defaults():
    config = parse_job(job(), "job.yaml")
    assert config.unlearns and len(config.forget_rounds) == 1
    assert config.objective.name == "token_matched" and config.solver.method == "scurenewton"
    assert config.solver.inner == "subspace" and config.solver.metric == "adam"
    assert config.cluster.zero_stage == 3 and config.data.format == "question_answer"


@pytest.mark.parametrize("method", ["scurenewton", "curenewton", "damped_newton", "pinv_newton", "adamw", "sgd"])
def test_every_method_has_its_own_settings(method):
    config = parse_job(job(solver={"method": method, "max_steps": 7, "stop": {"patience": 3}}), "job.yaml")
    assert (config.solver.method, config.solver.max_steps, config.solver.stop.patience) == (method, 7, 3)
    again = parse_job(config.model_dump(mode="json"), "its own dump")
    assert again == config and type(again.solver) is type(config.solver)
    assert "solver.max_stepz" in refuse(job(solver={"method": method, "max_stepz": 1}))


@pytest.mark.parametrize(
    ("method", "key", "owner"),
    [
        ("adamw", "max_krylov_steps", "scurenewton"),
        ("scurenewton", "learning_rate", "adamw, sgd"),
        ("scurenewton", "damping", "damped_newton"),
        ("damped_newton", "cubic_coefficient", "scurenewton, curenewton"),
        ("sgd", "curvature_batch", "scurenewton, curenewton, damped_newton, pinv_newton"),
    ],
)
def test_a_key_of_another_method_is_refused_by_name(method, key, owner):
    message = refuse(job(solver={"method": method, key: 1}))
    assert f"solver.{key}" in message and f"it belongs to solver.method {owner}" in message
    assert f"solver.{method}" not in message  # the method is not a part of the key


def test_a_method_that_is_none_is_refused():
    for method in ("newton", 3, None):
        message = refuse(job(solver={"method": method}))
        assert "scurenewton, curenewton, damped_newton, pinv_newton, adamw, sgd, " in message


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_file_parses(path):
    load_job(path, [])


def test_there_are_job_files_to_parse():
    assert JOBS, "the glob found nothing, so the test above ran for no file"


@pytest.mark.parametrize(
    ("section", "key"),
    [("solver", "max_step"), ("data", "question"), ("model", "trust_remote_code"), ("cluster", "workers")],
)
def test_unknown_key_of_a_section_is_refused_by_name(section, key):
    message = refuse(job(**{section: SMALLEST.get(section, {}) | {key: 1}}))
    assert f"{section}.{key}" in message and "does not exist" in message


def test_unknown_section_is_refused():
    assert "optimizer" in refuse(job(optimizer={}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("solver", "cubic_coefficient", 0.0),
        ("solver", "gradient_batch", 0),
        ("solver", "acceptance_threshold", 1.0),
        ("solver", "increase_factor", 1.0),
        ("solver", "seed", -1),
        ("solver", "method", "newton"),
        ("solver", "max_krylov_steps", 201),
        ("solver", "max_steps", "many"),
        ("objective", "forget_weight", -0.5),
        ("objective", "beta", 0),
        ("objective", "name", "kl"),
        ("curvature", "micro_batch_size", 0),
        ("curvature", "memory_budget_gib", 0),
        ("cluster", "zero_stage", 4),
        ("cluster", "num_workers", 0),
        ("data", "max_length", 7),
        ("data", "too_long", "cut"),
        ("data", "format", "jsonl"),
        ("model", "dtype", "float16"),
        ("save", "max_shard_gib", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(section, key, value):
    assert f"{section}.{key}" in refuse(job(**{section: SMALLEST.get(section, {}) | {key: value}}))


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "key",
    ["solver.cubic_coefficient", "solver.stop.max_seconds", "objective.beta", "train.weight_decay"]
    + ["cluster.call_timeout_seconds", "save.max_shard_gib"],
)
def test_numbers_that_are_not_finite_are_refused_by_name(key, value, tmp_path):
    with pytest.raises(ConfigError, match=f"{key}: .*finite|{key}: .*greater"):
        load_job(write_job(tmp_path, yaml.safe_dump(job())), [f"{key}={value}"])


@pytest.mark.parametrize("section", ["model", "data", "output"])
def test_missing_section_is_refused_by_name(section):
    assert f"{section}: Field required" in refuse(job(**{section: None}))


def test_all_complaints_come_at_once():
    message = refuse(job(solver={"seed": -1, "typo": 1}, output=None))
    assert "3 problem(s)" in message and "solver.seed" in message and "solver.typo" in message and "output" in message


def test_contradictions_are_refused_with_a_remedy():
    assert "both forget and rounds" in refuse(job(rounds=[{"subjects": ["person-0002"]}]))
    assert "rounds is empty" in refuse(job(forget=None, rounds=[]))
    assert "path is for holdout only" in refuse(job(forget={"path": "other.jsonl"}))
    assert "path is for holdout only" in refuse(job(forget=None, rounds=[{"path": "other.jsonl"}]))
    assert "empty selection" in refuse(job(forget={"subjects": []}))
    assert "need a holdout selection" in refuse(job(holdout=None))
    assert "curvature_batch is larger than gradient_batch" in refuse(
        job(solver={"gradient_batch": 8, "curvature_batch": 9})
    )
    assert "very_good_threshold is below" in refuse(job(solver={"acceptance_threshold": 0.8}))
    assert "exactly one worker" in refuse(job(cluster={"backend": "in_process"}))
    assert "leaves nothing out" in refuse(job(forget=None, train={"exclude_forget": True}))
    assert "name and split belong to path" in refuse(job(holdout={"subjects": ["a"], "split": "test"}))


def test_batches_of_equal_size_and_one_process_are_allowed():
    parse_job(job(solver={"gradient_batch": 8, "curvature_batch": 8}), "job.yaml")
    parse_job(job(solver={"method": "adamw", "gradient_batch": 8}), "job.yaml")  # which has no curvature batch
    parse_job(job(cluster={"backend": "in_process", "num_workers": 1}), "job.yaml")


def test_holdout_may_be_absent_where_nothing_needs_it():
    parse_job(job(holdout=None, objective={"name": "npo"}, solver={"stop": {"forget_matches_holdout": False}}), "x")
    assert not parse_job(job(holdout=None, train={}), "x").unlearns
    assert not parse_job(job(forget=None, holdout=None), "x").unlearns
    assert parse_job(job(forget=None, holdout=None), "x").forget_rounds == ()


def test_rounds_keep_their_order():
    config = parse_job(job(forget=None, rounds=[{"subjects": ["b"]}, {"subjects": ["a"]}]), "x")
    assert [selection.subjects for selection in config.forget_rounds] == [("b",), ("a",)]


@pytest.mark.parametrize(
    "tree",
    [
        job(),
        job(
            solver={"cubic_coefficient": 400, "very_good_threshold": 1.0, "stop": {"patience": 5}},
            data={"path": "a/../b.jsonl", "max_length": 8, "columns": ["x", "y"], "prompt_template": " {prompt} "},
            model={"path": "m", "trainable": ["*.mlp.*"]},
            cluster={"num_workers": 64, "zero_stage": 0},
        ),
    ],
)
def test_no_value_is_ever_rewritten(tree):
    config = parse_job(tree, "x")
    given = config.model_dump(mode="json", exclude_unset=True)
    assert given == tree
    assert JobConfig.model_validate(config.model_dump(mode="json")) == config
    assert JobConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_configuration_is_frozen():
    config = parse_job(job(), "x")
    with pytest.raises(ValidationError, match="frozen"):
        config.solver.max_steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.output = "elsewhere"


def write_job(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_reach_the_named_values_with_yaml_types(tmp_path):
    path = write_job(tmp_path, yaml.safe_dump(job()))
    overrides = ["solver.max_steps=7", "solver.stop.patience=3", "model.trainable=['*.mlp.*']", "data.name=null"]
    config = load_job(path, [*overrides, "output=a=b", "cluster.address=1.2.3.4:5", "solver.adaptive=false"])
    assert (config.solver.max_steps, config.solver.stop.patience, config.solver.adaptive) == (7, 3, False)
    assert config.model.trainable == ("*.mlp.*",) and config.data.name is None
    assert config.output == "a=b" and config.cluster.address == "1.2.3.4:5"
    assert load_job(path, ["solver.max_steps=1", "solver.max_steps=2"]).solver.max_steps == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("solver.max_steps", "section.key=value"),
        ("=3", "section.key=value"),
        ("output.deep=3", "'output' to be a section"),
        ("solver.max_steps=[1", "YAML value"),
        ("solver.typo=1", "solver.typo"),
        ("solver.max_steps=0", "solver.max_steps"),
    ],
)
def test_bad_overrides_are_refused(tmp_path, override, message):
    with pytest.raises(ConfigError) as caught:
        load_job(write_job(tmp_path, yaml.safe_dump(job())), [override])
    assert message in str(caught.value) and caught.value.exit_code == 3


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="gone.yaml.*check the path"):
        load_job(tmp_path / "gone.yaml", [])
    with pytest.raises(ConfigError, match="not YAML"):
        load_job(write_job(tmp_path, "model: [unclosed"), [])
    with pytest.raises(ConfigError, match="YAML mapping"):
        load_job(write_job(tmp_path, "- model\n- data\n"), [])
    with pytest.raises(ConfigError, match="YAML mapping"):
        load_job(write_job(tmp_path, ""), [])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {path: x}\nforget: {subjects: [zanzibarium: [}", 2),
        ("forget: zanzibarium: x", 1),
        ("a: 1\nb: 2\n\tzanzibarium: 3", 3),
    ],
)
def test_bad_syntax_is_located_but_not_quoted(tmp_path, text, line):
    with pytest.raises(ConfigError, match=f"not YAML .line {line}: ") as caught:
        load_job(write_job(tmp_path, text), [])
    assert "zanzibarium" not in str(caught.value)
    with pytest.raises(ConfigError, match="override 'forget=...'") as caught:
        load_job(write_job(tmp_path, yaml.safe_dump(job())), ["forget={subjects: [zanzibarium"])
    assert "zanzibarium" not in str(caught.value)


def test_values_that_yaml_cannot_make_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not YAML .a value that cannot be read"):
        load_job(write_job(tmp_path, "a: 2020-13-45"), [])
    with pytest.raises(ConfigError, match="override 'data.name=...'"):
        load_job(write_job(tmp_path, yaml.safe_dump(job())), ["data.name=2020-13-45"])


def test_files_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be read .Is a directory"):
        load_job(tmp_path, [])

    def deny(self, *arguments, **settings):  # the tests may be run by root, who may read everything
        raise PermissionError(13, "Permission denied")

    path = write_job(tmp_path, yaml.safe_dump(job()))
    monkeypatch.setattr(Path, "read_text", deny)
    with pytest.raises(ConfigError, match="cannot be read .Permission denied.*permissions"):
        load_job(path, [])


def test_messages_never_repeat_the_given_value():
    assert "zanzibarium" not in refuse(job(solver={"max_steps": "zanzibarium"}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("? [solver]\n: {max_steps: 3}\n", "line 1: found unhashable key"),
        ("solver: {max_steps: 3}\nsolver: {max_steps: 4}\n", "line 2: a key that is given twice"),
        ("solver: {max_steps: 3, max_steps: 4}\n", "line 1: a key that is given twice"),
        ("a: " + "[" * 500 + "]" * 500, "nested too deeply"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
    ],
)
def test_yaml_that_says_two_things_or_hides_is_refused(text, reason, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not YAML") as caught:
        load_job(path, [])
    assert reason in str(caught.value) and "max_steps" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("solver.max_steps=true", "a boolean where a number"),
        ("save.max_shard_gib=false", "a boolean where a number"),
        ("cluster.zero_stage=true", "a boolean where a number"),
        ("cluster.num_workers=true", "a boolean where a number"),
        ("output=''", "an empty path"),
        ("output='  '", "an empty path"),
        ("retrained=''", "an empty path"),
        ('output="a\\0b"', "a control character|another control character"),
        ('data.question_field="a\\nb"', "another control character"),
        (f"output={'x' * 5000}", "longer than a file system holds"),
        (f"data.path={'/x' * 3000}", "longer than a file system holds"),
        ("solver.cubic_coefficient=1.0e+300", "a number beyond 1e.38"),
        ("solver.inner_learning_rate=1.0e-300", "a number below 1e-30"),
        (f"solver.seed={10**30}", "a number beyond"),
        ("cluster.call_timeout_seconds=1.0e+30", "less than or equal to 10000000"),
        (f"{'x' * 300}=1", "xxx\\.\\.\\.: Extra inputs"),
    ],
)
def test_values_that_no_run_survives_are_refused(override, reason, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job()))
    with pytest.raises(ConfigError, match=reason) as caught:
        load_job(path, [override])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
