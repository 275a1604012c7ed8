"""`run` on a tiny checkpoint, in this process: what it writes, and what it must never write."""

import hashlib
import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import succeed
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_job import FORGET, HOLDOUT, RECORDS_EACH, TinyJob
from transformers import AutoModelForCausalLM, AutoTokenizer

PERSON, OTHER = FORGET[0], "person-0001-02"
ERASED = (*(f"{PERSON}-{kind:02d}" for kind in range(RECORDS_EACH)), OTHER)
"""One person and one record of another: both kinds of selection."""


@dataclass(frozen=True)
class Finished:
    folder: Path
    printed: str

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "record.json").read_text())

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.record["rounds"][0]["steps"]


@pytest.fixture(scope="module")
def finished(tiny: TinyJob, tmp_path_factory) -> Finished:
    """One run of three steps, all its output kept."""
    from distributed_unlearn.cli import INCOMPLETE, main

    folder = tmp_path_factory.mktemp("run") / "out"
    forget = f"forget={{subjects: [{PERSON}], record_ids: [{OTHER}]}}"
    with pytest.MonkeyPatch.context() as patch, (folder.parent / "printed").open("w+") as printed:
        patch.setattr("sys.stdout", printed)
        patch.setattr("sys.stderr", printed)
        code = main(tiny.run(folder, forget, "solver.max_steps=3", "objective.name=graddiff"))
        printed.seek(0)
        text = printed.read()
    assert code == INCOMPLETE, text  # this model never knew its records
    return Finished(folder, text)


def test_the_checkpoint_opens(finished: Finished, tiny: TinyJob):
    checkpoint = finished.folder / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny.model).get_vocab()
    assert tokenizer.pad_token_id == 0
    with torch.no_grad():
        assert torch.isfinite(model(**tokenizer("Where?", return_tensors="pt")).logits).all()
    before, after = load_file(tiny.model / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert before.keys() == after.keys()
    squared = sum(float((after[name].double() - before[name].double()).square().sum()) for name in before)
    record = finished.record
    assert math.sqrt(squared) == pytest.approx(record["rounds"][0]["update_norm"], rel=1e-5) and squared > 0
    assert math.sqrt(squared) == pytest.approx(record["surviving_update"]["saved_update_norm"], rel=1e-5)
    assert record["surviving_update"]["projection"] == pytest.approx(1.0, abs=1e-5)
    assert record["surviving_update"]["dtype"] == "float32"


def test_nothing_is_left_half_written(finished: Finished):
    assert sorted(path.name for path in finished.folder.iterdir()) == [
        "checkpoint",
        "metrics.jsonl",
        "pictures",
        "record.json",
        "record.salt",
        "report.html",
        "tensorboard",
    ]


def test_record_holds_the_resolved_configuration(finished: Finished, tiny: TinyJob):
    config = finished.record["config"]
    assert config["solver"]["max_steps"] == 3 and config["solver"]["seed"] == 0
    assert config["cluster"]["zero_stage"] == 3 and config["objective"]["beta"] == 0.1
    model = {"revision": None, "task": "causal_lm", "dtype": "float32", "trainable": "all"}
    assert {"path": str(tiny.model), **model}.items() <= config["model"].items()
    assert config["holdout"]["subjects"] == list(HOLDOUT)
    named = {"subjects": "1 named", "record_ids": "1 named"}
    assert {**named, "ids_file": None}.items() <= config["forget"].items()
    versions = finished.record["versions"]
    assert versions["torch"] == torch.__version__ and {"python", "ray", "deepspeed", "transformers"} <= versions.keys()


def test_file_hashes_match(finished: Finished, tiny: TinyJob):
    record = finished.record
    for files, folder in (
        (record["base"]["files"], tiny.model),
        (record["result"]["files"], finished.folder / "checkpoint"),
    ):
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
        for name, digest in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert record["base"]["files"]["model.safetensors"] != record["result"]["files"]["model.safetensors"]


def test_salt_proves_what_was_erased(finished: Finished):
    path = finished.folder / "record.salt"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    salt = path.read_text().strip()
    hashes = [hashlib.sha256(f"{salt}\0{name}".encode()).hexdigest() for name in ERASED]
    assert finished.record["erased_ids_sha256_salted"] == [sorted(hashes)]
    assert salt not in (finished.folder / "record.json").read_text()


def test_steps_are_complete(finished: Finished):
    assert [step["step"] for step in finished.steps] == [0, 1, 2]
    assert any(step["accepted"] for step in finished.steps)
    for step in finished.steps:
        assert step["alpha"] > 0 and step["smallest_ritz_value"] <= step["largest_ritz_value"]
        assert step["gamma"] == pytest.approx(step["cubic_coefficient"] * step["alpha"] / 2, rel=1e-9)
        # The dual's alpha is the length of the update, so both say how far the weights went.
        assert step["update_norm"] == pytest.approx(step["alpha"] if step["accepted"] else 0.0, rel=1e-3)
        assert step["predicted_reduction"] > 0
        ratio = step["actual_reduction"] / step["predicted_reduction"]
        assert step["acceptance_ratio"] == pytest.approx(ratio, rel=1e-2)
        assert step["num_products"] == step["num_krylov_steps"] == 2
        assert step["gradient_norm"] > 0 and step["wall_seconds"] > 0 and step["terms"]
    for step, following in zip(finished.steps, finished.steps[1:], strict=False):
        assert step["loss"] != following["loss"]


def test_evaluation_covers_every_set(finished: Finished):
    round_record = finished.record["rounds"][0]
    num_records = {"forget": 4, "retain": 8, "holdout": 6}
    for when in ("before", "after"):
        assert {name: scores["num_records"] for name, scores in round_record[when].items()} == num_records
    assert (round_record["num_forget_records"], round_record["num_retain_records"]) == (4, 8)
    forget = [round_record[when]["forget"]["loss_nats_per_token"] for when in ("before", "after")]
    assert forget[1] > forget[0]  # graddiff ascends on the forget set
    assert round_record["stop_reason"].startswith("max_steps") and round_record["num_products"] == 6


def test_metrics_and_events_agree_with_the_record(finished: Finished):
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["model", *["round_1/step"] * 3, "round", "surviving_update"]
    logged = [line["values"]["loss"] for line in lines if line["kind"] == "round_1/step"]
    assert logged == [step["loss"] for step in finished.steps]
    events = EventAccumulator(str(finished.folder / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("round_1/step/loss")]
    assert shown == pytest.approx(logged, rel=1e-6)


def test_report_and_model_card(finished: Finished):
    page = (finished.folder / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")
    assert "data:image/svg+xml;base64" in page and "Round 1" in page and "max_steps" in page
    card = (finished.folder / "checkpoint" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "4 records asked to be erased, 8 to be retained, 3 steps, 6 curvature products" in card


def _occurrences(folder: Path, texts: list[str]) -> list[tuple[str, str]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert len(files) > 8
    contents = {path.name: path.read_bytes() for path in files}
    return [(name, text) for name, content in contents.items() for text in texts if text.encode() in content]


def test_nothing_erased_is_written_anywhere(finished: Finished, tiny: TinyJob):
    erased = [row for row in tiny.rows() if row["record_id"] in ERASED]
    assert len(erased) == len(ERASED)
    secrets = [*ERASED, PERSON]
    for row in erased:
        name = " ".join(row["question"].removesuffix("?").split()[-2:])
        # Every made-up word of an answer (they alone are capitalised and long) tells something by itself.
        words = [word for word in row["answer"].replace(",", " ").replace(".", " ").split() if word[0].isupper()]
        secrets += [row["answer"], row["question"], name, *(word for word in words if len(word) > 5)]
    months = {"January", "February", "August", "September", "October", "November", "December", "Monday", "Prize"}
    secrets = [text for text in secrets if text not in months]
    assert _occurrences(finished.folder, secrets) == []
    assert [text for text in secrets if text in finished.printed] == []
    # The search finds what is there: the holdout selection is not a secret.
    assert ("record.json", HOLDOUT[0]) in _occurrences(finished.folder, [*HOLDOUT])


def test_the_same_job_gives_the_same_weights(finished: Finished, tiny: TinyJob, tmp_path, capsys):
    forget = f"forget={{subjects: [{PERSON}], record_ids: [{OTHER}]}}"
    overrides = (forget, "solver.max_steps=3", "objective.name=graddiff", "curvature.micro_batch_size=8")
    succeed(capsys, tiny.run(tmp_path / "out", *overrides))
    files = [folder / "checkpoint" / "model.safetensors" for folder in (finished.folder, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
