"""Every mistake in a job is refused with one readable error before a worker is started or a weight is read."""

import contextlib
import json
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Outcome, assert_refused, call
from tiny_job import NUM_PEOPLE, RECORDS_EACH, TinyJob
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import distributed_unlearn.commands.check
import distributed_unlearn.commands.run
import distributed_unlearn.demo.run

EVERYBODY = ",".join(f"person-{i:04d}" for i in range(NUM_PEOPLE - 2))


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuse(*arguments: object) -> Iterator[None]:
        raise AssertionError("a worker was started")
        yield

    for module in (
        distributed_unlearn.commands.run,
        distributed_unlearn.commands.check,
        distributed_unlearn.demo.run,
    ):
        monkeypatch.setattr(module, "open_group", refuse)


@dataclass(frozen=True)
class Refusal:
    name: str
    overrides: tuple[str, ...]
    code: int
    kind: str
    texts: tuple[str, ...]


REFUSALS = (
    Refusal("unknown_key", ("solver.max_stepz=3",), 3, "configuration", ("solver.max_stepz", "does not exist")),
    Refusal("unknown_section", ("solvers={a: 1}",), 3, "configuration", ("solvers", "does not exist")),
    Refusal("wrong_type", ("solver.max_steps=many",), 3, "configuration", ("solver.max_steps", "integer")),
    Refusal("out_of_range", ("cluster.num_workers=0",), 3, "configuration", ("cluster.num_workers",)),
    Refusal("in_process_and_many", ("cluster.num_workers=2",), 3, "configuration", ("in_process", "one worker")),
    Refusal("no_holdout", ("holdout=null",), 3, "configuration", ("holdout_matched", "holdout")),
    Refusal("nothing_to_do", ("forget=null",), 3, "configuration", ("without forget, rounds or train",)),
    Refusal("no_assignment", ("solver.max_steps",), 3, "configuration", ("section.key=value",)),
    Refusal("bad_override", ("solver.max_steps=[1",), 3, "configuration", ("override",)),
    Refusal("context_exceeded", ("data.max_length=4096",), 3, "configuration", ("4096", "128")),
    Refusal("missing_data", ("data.path=./nowhere.jsonl",), 4, "data", ("./nowhere.jsonl", "does not exist")),
    Refusal("unknown_subject", ("forget={subjects: [nobody]}",), 4, "data", ("1 unknown subject(s)", "'nobody'")),
    Refusal(
        "unknown_ids",
        ("forget={record_ids: [person-0000-00, none-1, none-2]}",),
        4,
        "data",
        ("2 unknown record id(s) of 3", "'none-1', 'none-2'"),
    ),
    Refusal(
        "forget_and_holdout",
        ("forget={subjects: [person-0000, person-0004]}",),
        4,
        "data",
        (f"{RECORDS_EACH} record(s) both to be forgotten", "held out", "'person-0004-00'"),
    ),
    Refusal("nothing_retained", (f"forget={{subjects: [{EVERYBODY}]}}",), 4, "data", ("no record left to retain",)),
    Refusal(
        "twice_in_rounds",
        ("forget=null", "rounds=[{subjects: [person-0000]}, {record_ids: [person-0000-01]}]"),
        4,
        "data",
        ("an earlier round forgets",),
    ),
    Refusal(
        "too_long",
        ("data.max_length=64",),
        4,
        "data",
        ("records longer than 64 tokens", "truncate, which cuts the answer's end", "drop, which leaves the records"),
    ),
    Refusal(
        "drop_what_is_to_be_forgotten",
        ("data.max_length=64", "data.too_long=drop"),
        4,
        "data",
        ("to be forgotten that are longer than 64 tokens", "truncate"),
    ),
    Refusal("missing_model", ("model.path=./no/such/model",), 5, "model", ("./no/such/model", "is no folder")),
    Refusal("unreachable_model", ("model.path=nobody/nothing",), 5, "model", ("nobody/nothing",)),
    Refusal("missing_retrained", ("retrained=./no/such/model",), 5, "model", ("./no/such/model", "is no folder")),
)


def refused(tiny: TinyJob, capsys: pytest.CaptureFixture[str], output: Path, *overrides: str) -> Outcome:
    """The outcome of `run`, which wrote nothing and showed nothing of a record but its id."""
    outcome = call(capsys, tiny.run(output, *overrides))
    assert not output.exists()
    for row in tiny.rows():
        assert row["answer"] not in outcome.out + outcome.err and row["question"] not in outcome.out + outcome.err
    return outcome


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_run_refuses(case: Refusal, tiny: TinyJob, tmp_path, capsys):
    outcome = refused(tiny, capsys, tmp_path / "out", *case.overrides)
    assert_refused(outcome, case.code, case.kind, *case.texts)


@pytest.mark.parametrize("name", ["missing_model", "unknown_ids", "too_long"])
def test_plan_refuses_as_run_does(name, tiny: TinyJob, tmp_path, capsys):
    case = next(case for case in REFUSALS if case.name == name)
    _, *arguments = tiny.run(tmp_path / "out", *case.overrides)
    assert_refused(call(capsys, ["plan", *arguments]), case.code, case.kind, *case.texts)


@pytest.mark.parametrize("train", ["", "{epochs: 1}"], ids=["unlearn", "train"])
def test_existing_output_is_refused(train, tiny: TinyJob, tmp_path, capsys):
    kept = tmp_path / "out" / "checkpoint" / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    arguments = tiny.run(tmp_path / "out", *([f"train={train}"] if train else []))
    for command in ("run", "plan"):
        outcome = call(capsys, [command, *arguments[1:]])
        assert_refused(outcome, 3, "configuration", str(kept.parent), "which exists", "overwrite: true")
    assert kept.read_text() == "kept"


def test_too_long_counts_the_records(tiny: TinyJob, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    lengths = [
        len(tokenizer(f"Question: {r['question']}\nAnswer: {r['answer']}")["input_ids"]) + 1 for r in tiny.rows()
    ]
    limit = sorted(lengths)[len(lengths) // 2]
    num_long = sum(length > limit for length in lengths)
    assert 0 < num_long < len(lengths)
    outcome = refused(tiny, capsys, tmp_path / "out", f"data.max_length={limit}")
    text = f"{num_long} of {len(lengths)} records longer than {limit} tokens, the longest {max(lengths)}"
    assert_refused(outcome, 4, "data", text)


def test_job_file_is_missing(tmp_path, capsys):
    path = tmp_path / "none.yaml"
    assert_refused(call(capsys, ["run", str(path)]), 3, "configuration", str(path), "an existing YAML file")


@pytest.mark.parametrize("text", ["model: [unclosed", "a: b: c", "\tmodel: x", "just words", ""], ids=repr)
def test_job_file_is_no_job(text, tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert_refused(call(capsys, ["run", str(path)]), 3, "configuration", str(path))


def test_tokenizer_without_pad_token(tiny: TinyJob, tmp_path, capsys):
    model = tiny.copy_model(tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(model).pad_token_id is None
    outcome = refused(tiny, capsys, tmp_path / "out", f"model.path={model}")
    assert_refused(outcome, 5, "model", "no pad token", "set data.pad_token", "tokenizer_config.json")


def test_pickled_checkpoint(tiny: TinyJob, tmp_path, capsys):
    model = tiny.copy_model(tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    outcome = refused(tiny, capsys, tmp_path / "out", f"model.path={model}")
    assert_refused(outcome, 5, "model", "without *.safetensors", "pickled weights are never loaded")


def test_a_missing_tokenizer_is_said_to_be_missing(tiny: TinyJob, tmp_path, capsys):
    """And not found out later, as records without a token."""
    model = tiny.copy_model(tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    outcome = refused(tiny, capsys, tmp_path / "out", f"model.path={model}")
    assert_refused(
        outcome, 5, "model", "without a readable tokenizer", "save the tokenizer into the checkpoint's folder"
    )


def test_ids_file(tiny: TinyJob, tmp_path, capsys):
    ids = tmp_path / "ids"
    overrides = ("forget=null", f"rounds=[{{ids_file: {ids}}}]")
    assert_refused(refused(tiny, capsys, tmp_path / "out", *overrides), 4, "data", "cannot be read")
    ids.write_text("\n \n")
    assert_refused(refused(tiny, capsys, tmp_path / "out", *overrides), 4, "data", "without ids")
    ids.write_text("person-0001-00\nnobody-00\n")
    assert_refused(refused(tiny, capsys, tmp_path / "out", *overrides), 4, "data", "1 unknown record id(s) of 2")
    ids.write_text("person-0001-00\n")
    dropping = (*overrides, "data.max_length=24", "data.too_long=drop")
    assert_refused(
        refused(tiny, capsys, tmp_path / "out", *dropping), 4, "data", "1 record(s) to be forgotten that are"
    )


def test_demo_keeps_an_earlier_one(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}")
    outcome = call(capsys, ["demo", "--short", "--output", str(tmp_path)])
    assert_refused(outcome, 3, "configuration", "an earlier demo", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--seed", "-1"],
        ["demo", "--num-workers", "0"],
        ["check", "curvature", "--model", "m", "--batch-size", "0"],
        ["check", "curvature", "--model", "m", "--sequence-length", "3"],
        ["check", "curvature", "--model", "m", "--seed", "-1"],
        ["check", "curvature", "--model", "m", "--num-workers", "-2"],
    ],
    ids=lambda arguments: " ".join(arguments[-2:]),
)
def test_options_out_of_range(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option, value = arguments[-2:]
    assert_refused(call(capsys, arguments), 3, "configuration", f"got {option} {value}", "at least", option)
    assert list(tmp_path.iterdir()) == []


def test_the_packaged_model_replaces_nothing_unasked(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    script = Path(__file__).parents[2] / "jobs" / "smollm2_from_package.py"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # installed or not, it must not get so far
    for folder, message in ((tmp_path, "which exists: .*--overwrite"), (kept, "which is a file")):
        monkeypatch.setattr("sys.argv", [str(script), str(folder)])
        with pytest.raises(SystemExit, match=message):
            runpy.run_path(str(script), run_name="__main__")
    assert kept.read_text() == "kept"


def test_check_of_a_missing_model(capsys):
    outcome = call(capsys, ["check", "curvature", "--model", "./no/such/model"])
    assert_refused(outcome, 5, "model", "./no/such/model")


def test_wrong_usage_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        call(capsys, ["unlearn"])
    assert caught.value.code == 2
    assert "usage: distributed-unlearn" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["architecture", "tokenizer"])
def test_a_reference_of_another_kind_is_refused(kind, tiny: TinyJob, tmp_path, capsys):
    reference = tiny.copy_model(tmp_path / "reference")
    if kind == "architecture":
        config = AutoConfig.from_pretrained(reference, num_hidden_layers=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(reference)
    else:
        tokenizer = AutoTokenizer.from_pretrained(reference)
        tokenizer.add_tokens(["zanzibarium"])
        tokenizer.save_pretrained(reference)
    for command in ("plan", "run"):
        outcome = call(capsys, [command, *tiny.run(tmp_path / "out", f"retrained={reference}")[1:]])
        assert_refused(outcome, 5, "model", "a retrained reference", "train the reference from the same base")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use_gpu", [None, "never", "always"])
def test_the_demo_takes_its_workers_gpus_from_the_command_line(use_gpu, tmp_path, capsys, monkeypatch):
    clusters = []
    monkeypatch.setattr(
        "distributed_unlearn.demo.run.run_demo", lambda settings, cluster, *rest: clusters.append(cluster)
    )
    options = [] if use_gpu is None else ["--use-gpu", use_gpu]
    assert call(capsys, ["demo", "--output", str(tmp_path), *options]).code == 0
    assert [cluster.use_gpu for cluster in clusters] == [use_gpu or "auto"]
