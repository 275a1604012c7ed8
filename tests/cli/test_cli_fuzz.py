"""Hundreds of malformed jobs and records: each one clear error, nothing written, no text of a record in it."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Outcome, call
from tiny_job import TinyJob

DOCUMENTED = {3, 4, 5, 6, 7, 8, 9}
NUM_CONFIG, NUM_RECORDS, NUM_FILES = 160, 110, 40

pytestmark = pytest.mark.slow

SECRET, WORD = "zanzibarium", "quux"
"""Text of records, which must never be seen; and a word that may stand anywhere."""
VALUES: list[Any] = [
    *(True, False, None, -1, 0, 10**30, -(10**30), 1e300, -1e300, 1e-300, 0.5, "", " ", "1e300", WORD * 40),
    *([], {}, [[]], [None], [WORD], {WORD: WORD}, "a\nb", "a\0b", "\u2028", "x" * 5000, "/" * 5000, "~nobody/x"),
    *(
        "..",
        "[",
        "*",
        "train[",
        "2021-13-45",
        "\x1b[31m",
        "$(id)",
        "%s%n",
        "{prompt}",
        "file:///etc/passwd",
        "sklearn:x",
    ),
]
"""None of which is what any key is likely to want; a few are, and then the job is valid."""


def _keys(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _keys(value, (*path, key))


def _spoil_config(tree: dict[str, Any], generator: random.Random) -> None:
    """Set, remove or add one to three keys anywhere."""
    for _ in range(generator.randint(1, 3)):
        path = generator.choice(list(_keys(tree)))
        section = tree
        for key in path[:-1]:
            if not isinstance(section := section[key], dict):
                return
        action = generator.choice(("set", "set", "set", "remove", "add"))
        if action == "set":
            section[path[-1]] = generator.choice(VALUES)
        elif action == "remove":
            section.pop(path[-1], None)
        else:
            section[generator.choice(("path", "max_step", "name", WORD * 30, "a\nb", ""))] = generator.choice(VALUES)


ALL_KEYS = {
    "data": {"split": "train", "id_field": "record_id", "max_length": 128, "too_long": "refuse", "columns": None}
    | {"question_field": "question", "answer_field": "answer", "prompt_template": "{prompt}", "erased": None},
    "objective": {"name": "holdout_matched", "forget_weight": 1.0, "huber_delta": 1.0},
    "curvature": {"product": "hessian", "micro_batch_size": 8, "memory_budget_gib": 1.0},
    "evaluation": {"max_records_per_set": None},
    "save": {"dtype": None, "max_shard_gib": 1.0},
    "rounds": None,
    "retrained": None,
    "overwrite": False,
}
"""Added to the tiny job, so that every kind of key is hit."""


def _spoil_record(row: dict[str, Any], generator: random.Random) -> bytes:
    """One line of a records file with a defect."""
    keys = list(row)
    kind = generator.randrange(12)
    if kind < 5:
        row[generator.choice(keys)] = generator.choice(VALUES)
    elif kind == 5:
        del row[generator.choice(["question", "answer", "record_id"])]
    elif kind == 6:
        row["answer"] = " ".join([SECRET] * 4000)
    elif kind == 7:
        row["record_id"] = "person-0001-00"  # twice
    elif kind == 8:
        row["question"] = SECRET + chr(generator.randrange(0xD800, 0xE000))
    line = json.dumps(row)
    if kind == 9:
        line = line[: generator.randrange(1, len(line))]
    if kind == 10:
        line = line[:-1] + f', "answer": "{SECRET}"}}'
    encoded = line.encode("utf-8")
    if kind == 11:
        at = generator.randrange(len(encoded))
        encoded = encoded[:at] + bytes([generator.randrange(128, 256)]) + encoded[at:]
    return encoded


def _spoil_file(folder: Path, generator: random.Random) -> None:
    """Cut, overwrite or garble one of the checkpoint's small files."""
    path = folder / generator.choice(("config.json", "tokenizer.json", "tokenizer_config.json"))
    content = path.read_bytes()
    kind = generator.randrange(5)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(content[: generator.randrange(len(content))])
    elif kind == 2:
        path.write_bytes(generator.choice((b"", b"{}", b"[]", b"null", b"17", b'"a"', b"\xff\xfe", b"[" * 100_000)))
    elif kind == 3:
        at = generator.randrange(len(content))
        path.write_bytes(content[:at] + bytes([generator.randrange(256)]) + content[at + 1 :])
    else:
        tree = json.loads(content)
        tree[generator.choice(list(tree))] = generator.choice(VALUES)
        path.write_text(json.dumps(tree))


class ReachedWorkersError(Exception):
    """The run has come to its workers: it accepted the job."""


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` ends where it would start workers."""

    def open_group(*arguments: object) -> None:
        raise ReachedWorkersError

    monkeypatch.setattr("distributed_unlearn.commands.run.open_group", open_group)


def _check(capsys: pytest.CaptureFixture[str], job: Path, output: Path, case: str) -> bool:
    """Plan and run the job; True where both refused it, as it must be if it is refused at all, in the same words."""
    outcome = call(capsys, ["plan", str(job)])
    assert not output.exists(), case
    try:
        run = call(capsys, ["run", str(job)])
    except ReachedWorkersError:
        captured = capsys.readouterr()
        run = Outcome(0, captured.out, captured.err)
    assert not output.exists(), case
    assert (run.code, run.err) == (outcome.code, outcome.err), f"{case}: plan {outcome}, run {run}"
    assert SECRET not in run.out + run.err and "Traceback" not in run.out + run.err, case
    if outcome.code == 0:
        assert "the job is valid" in outcome.out, case
        return False
    assert outcome.code in DOCUMENTED, f"{case}: {outcome.code}\n{outcome.err[-3000:]}"
    written = outcome.err.rstrip("\n").split("\n")
    assert len(written) == 3 and written[0].startswith("error ("), f"{case}\n{outcome.err[-3000:]}"
    assert written[1].startswith("  expected: ") and written[2].startswith("  to fix it: "), f"{case}\n{outcome.err}"
    assert "Traceback" not in outcome.out + outcome.err and SECRET not in outcome.out + outcome.err, case
    return True


def _job(tiny: TinyJob, folder: Path, **sections: Any) -> tuple[dict[str, Any], Path, Path]:
    tree = yaml.safe_load(tiny.job.read_text())
    for name, section in ALL_KEYS.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    output = folder / "out"
    tree |= {
        "output": str(output),
        "forget": {"subjects": ["person-0000"], "record_ids": ["person-0001-00"]},
        **sections,
    }
    return tree, folder / "job.yaml", output


def test_malformed_jobs(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some values are relative paths
    refused = 0
    for seed in range(NUM_CONFIG):
        generator = random.Random(seed)
        tree, job, output = _job(tiny, tmp_path)
        _spoil_config(tree, generator)
        job.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        refused += _check(capsys, job, output, f"job {seed}: {job.read_text()[:1500]}")
    assert refused > NUM_CONFIG * 0.6  # the cases do spoil something
    assert {path.name for path in tmp_path.iterdir()} == {"job.yaml"}


def test_malformed_records(tiny: TinyJob, tmp_path, capsys):
    rows, refused = tiny.rows(), 0
    for seed in range(NUM_RECORDS):
        generator = random.Random(seed)
        path = tmp_path / "records.jsonl"
        tree, job, output = _job(tiny, tmp_path)
        tree["data"]["path"] = str(path)
        job.write_text(yaml.safe_dump(tree))
        lines = [json.dumps(row).encode() for row in rows]
        at = generator.randrange(len(rows))
        lines[at] = _spoil_record({**rows[at], "question": f"{SECRET} {rows[at]['question']}"}, generator)
        path.write_bytes(b"\n".join(lines) + b"\n")
        outcome_ok = not _check(capsys, job, output, f"records {seed}: {lines[at][:300]!r}")
        refused += not outcome_ok
    assert refused > NUM_RECORDS * 0.5


def test_malformed_checkpoint_files(tiny: TinyJob, tmp_path, capsys):
    refused = 0
    for seed in range(NUM_FILES):
        generator = random.Random(seed)
        model = tmp_path / "model"
        shutil.rmtree(model, ignore_errors=True)
        tiny.copy_model(model)
        _spoil_file(model, generator)
        tree, job, output = _job(tiny, tmp_path, model={"path": str(model)})
        job.write_text(yaml.safe_dump(tree))
        refused += _check(capsys, job, output, f"checkpoint {seed}")
    assert refused > NUM_FILES * 0.4
