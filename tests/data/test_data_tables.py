"""Local files of every kind and shape, read without a copy on disk; defects by file and line, never by their text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from distributed_unlearn.config import DataConfig
from distributed_unlearn.data.corpus import load_records
from distributed_unlearn.data.tables import quiet_datasets
from distributed_unlearn.errors import UserError

SECRET = "zanzibarium"
GOOD = {"record_id": "r0", "question": f"{SECRET}?", "answer": SECRET}


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def ids(config: DataConfig) -> list[str]:
    return [record.record_id for record in load_records(config)]


def refusal(**settings: object) -> str:
    with pytest.raises(UserError) as caught:
        load_records(DataConfig(**settings))
    assert SECRET not in str(caught.value) and caught.value.__cause__ is None
    return str(caught.value)


def test_a_csv_file_without_names_gets_them_from_the_job(tmp_path):
    path = tmp_path / "ag.csv"
    path.write_text('"3","Fears, ""so to say""","a \\u2028b\nc"\n\n"4","T2","D2"\n', encoding="utf-8")
    settings = {"path": str(path), "format": "classification", "text_field": "title", "label_field": "class"}
    records = load_records(
        DataConfig(**settings, columns=("class", "title", "description"), prompt_template="{prompt}")
    )
    assert [(r.record_id, r.prompt, r.answer) for r in records] == [
        ("row-0", 'Fears, "so to say"', "3"),
        ("row-1", "T2", "4"),
    ]
    named = DataConfig(**settings, columns=("class", "title", "description"), label_names=("1", "2", "3", "4"))
    assert [record.answer for record in load_records(named)] == ["3", "4"]
    text = refusal(**settings, columns=("class", "title"))
    assert "line 1 of" in text and "3 field(s) where 2 columns are" in text
    jsonl = lines(tmp_path / "a.jsonl", GOOD)
    assert "data.columns for CSV files alone" in refusal(path=jsonl, columns=("a", "b"))


def test_the_names_of_columns_that_may_be_text_are_never_shown(tmp_path):
    (tmp_path / "bare.csv").write_text(f"1,{SECRET}\n2,b\n")
    text = refusal(path=str(tmp_path / "bare.csv"))
    assert "2 column(s), named by its first line" in text and "data.columns" in text
    # Question to answer, as some write JSON: every key is text.
    text = refusal(path=lines(tmp_path / "odd.jsonl", {SECRET: "a"}, {"who": "b"}))
    assert "2 columns, not all of them in every row" in text


DEFECTS = {
    "torn": (b'{"question": "zanzibarium", "answer": \n', "not JSON"),
    "no object": (b'["zanzibarium"]\n', "holds list"),
    "a number": (b"17\n", "holds int"),
    "null": (b"null\n", "holds NoneType"),
    "latin-1": ('{"question": "zanzibarium", "answer": "\u00e9"}\n'.encode("latin-1"), "not UTF-8"),
    "utf-16": ('{"question": "zanzibarium"}\n'.encode("utf-16"), "not UTF-8"),
    "twice": (b'{"question": "zanzibarium", "answer": "a", "answer": "b"}\n', "key given twice"),
    "nan": (b'{"question": "zanzibarium", "answer": NaN}\n', "NaN"),
    "deep": (b'{"question": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
    "digits": (b'{"question": "zanzibarium", "answer": ' + b"7" * 5_000 + b"}\n", "too long"),
    "two in a line": (b'{"question": "zanzibarium"}{"answer": "a"}\n', "not JSON"),
    "control": (b'{"question": "zanzi\x01barium"}\n', "not JSON"),
    "no answer": (b'{"record_id": "r1", "question": "zanzibarium"}\n', "NoneType in column 'answer' of record 'r1'"),
    "list": (b'{"record_id": "r1", "question": "zanzibarium", "answer": ["a"]}\n', "list in column 'answer'"),
    "surrogate": (b'{"record_id": "r1", "question": "zanzibarium", "answer": "\\ud800"}\n', "half a surrogate"),
    "no id": (b'{"question": "zanzibarium", "answer": "a"}\n', "no id in column"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named_by_file_and_line(name, tmp_path):
    defect, reason = DEFECTS[name]
    path = tmp_path / "records.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + defect)
    text = refusal(path=str(path))
    assert reason in text and f"line 3 of '{path}'" in text


def test_defects_of_other_kinds_of_files(tmp_path):
    (tmp_path / "a.json").write_text(f'[{{"question": "{SECRET}"}},\n {{"question": }}]')
    assert "line 2 of" in refusal(path=str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text(f'["{SECRET}"]')
    assert "item 1 is not an object" in refusal(path=str(tmp_path / "b.json"))
    (tmp_path / "c.csv").write_text(f'question,answer\na,"{SECRET}\n')
    assert "quotes or line ends" in refusal(path=str(tmp_path / "c.csv"))
    (tmp_path / "d.csv").write_text("question,answer,answer\na,b,c\n")
    assert "not all different" in refusal(path=str(tmp_path / "d.csv"))
    (tmp_path / "e.parquet").write_text(SECRET)
    assert "e.parquet', which cannot be read" in refusal(path=str(tmp_path / "e.parquet"))
    (tmp_path / "f.csv").write_bytes(b"question,answer\na,b\n\xe9,c\n")
    assert "line 3 of" in refusal(path=str(tmp_path / "f.csv"))
    (tmp_path / "g.jsonl").mkdir()
    (tmp_path / "h.csv").write_text("question,answer\n")
    assert "no rows" in refusal(path=str(tmp_path / "h.csv"))


def test_a_name_with_brackets_is_that_file(tmp_path):
    lines(tmp_path / "a.jsonl", {"record_id": "other", "question": "q", "answer": "a"})
    path = lines(tmp_path / "[ab].jsonl", {"record_id": "mine", "question": "q", "answer": "a"})
    assert ids(DataConfig(path=path)) == ["mine"]


def test_several_files_and_a_folder_of_them(tmp_path):
    first = lines(tmp_path / "train-0.jsonl", {**GOOD, "record_id": "a"})
    (tmp_path / "train-1.csv").write_text("record_id,question,answer\n007,q,a\n")
    lines(tmp_path / "test.jsonl", {**GOOD, "record_id": "t"})
    (tmp_path / ".hidden.jsonl").write_text("{")
    both = (first, str(tmp_path / "train-1.csv"))
    assert ids(DataConfig(path=both)) == ["a", "007"] == ids(DataConfig(path=str(tmp_path)))
    assert ids(DataConfig(path=both, split="train[1:]")) == ["007"]
    assert ids(DataConfig(path=str(tmp_path), split="test")) == ["t"]
    assert "which has test, train" in refusal(path=str(tmp_path), split="validation")
    assert "data.split 'train[x'" in refusal(path=str(tmp_path), split="train[x")
    assert "line 1 of" in refusal(path=(first, lines(tmp_path / "bad.jsonl", {**GOOD, "record_id": ""})))
    assert "does not exist" in refusal(path=(first, str(tmp_path / "gone.jsonl")))


def test_a_folder_as_datasets_saves_it(tmp_path):
    rows = [{**GOOD, "record_id": name} for name in ("a", "b")]
    with quiet_datasets():
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"test": datasets.Dataset.from_list(rows[1:])}).save_to_disk(tmp_path / "more")
    assert ids(DataConfig(path=str(tmp_path / "one"))) == ["a", "b"]
    assert ids(DataConfig(path=str(tmp_path / "more"), split="test")) == ["b"]
    assert "its split 'train'" in refusal(path=str(tmp_path / "more"))


def test_columns_that_the_job_names_must_be_there(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "person": "p"})
    assert ids(DataConfig(path=path)) == ["row-0"]
    assert "no column 'person_id' for the ids" in refusal(path=path, id_field="person_id")
    assert "no column 'owner' for the subjects" in refusal(path=path, subject_field="owner")
    assert load_records(DataConfig(path=path, subject_field="person"))[0].subject_id == "p"
    assert load_records(DataConfig(path=path, id_field="gone"), require_ids=False)[0].record_id == "row-0"


def test_a_kill_while_records_load_leaves_no_text(tmp_path):
    """Killed in the middle of reading: nothing that was read is in the temporary folder, nor in any cache."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "tmp").mkdir()
    with quiet_datasets():
        datasets.Dataset.from_list([GOOD] * 3).to_parquet(tmp_path / "a.parquet")
    lines(tmp_path / "a.jsonl", *[GOOD] * 3)
    (tmp_path / "a.csv").write_text(f"record_id,question,answer\nr,q,{SECRET}\n")
    program = (
        "import os, signal, sys\n"
        "from distributed_unlearn.config import DataConfig\n"
        "from distributed_unlearn.data import corpus\n"
        "corpus.refuse_duplicates = lambda ids: None\n"
        "with corpus.open_table(DataConfig(path=sys.argv[1])) as table:\n"
        "    assert len(list(table))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    variables = {**os.environ, "HOME": str(home), "TMPDIR": str(tmp_path / "tmp"), "HF_HOME": str(home / "hf")}
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        run = subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], env=variables, capture_output=True)
        assert run.returncode == -9, run.stderr[-2000:]
    for folder in (home, tmp_path / "tmp"):
        left = [path for path in folder.rglob("*") if path.is_file()]
        assert not any(SECRET.encode() in path.read_bytes() for path in left), left


def test_settings_that_contradict_each_other_are_refused():
    for settings, reason in (
        ({"question_field": "answer"}, "must name different columns"),
        ({"id_field": "question"}, "must name different columns"),
        ({"format": "chat", "subject_field": "messages"}, "must name different columns"),
        ({"label_names": ("a",)}, "label_names belongs to"),
        ({"columns": ("a", "a")}, "all different"),
        ({"path": ()}, "at least one"),
    ):
        with pytest.raises(ValueError, match=reason):
            DataConfig(**{"path": "a.jsonl", **settings})
    assert DataConfig(path="a", format="classification", subject_field="label").subject_field == "label"


def test_settings_of_the_hub_are_refused_with_a_file(tmp_path):
    assert "data.name for data sets of the Hub" in refusal(path=lines(tmp_path / "a.jsonl", GOOD), name="x")
    assert "suffix" in refusal(path=lines(tmp_path / "a.txt", GOOD))
