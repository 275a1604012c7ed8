"""Records are read as they are spelt, for every format, and bad files are refused without showing text."""

import json
import socket
from pathlib import Path

import datasets
import pytest

from distributed_unlearn.config import DataConfig
from distributed_unlearn.data.corpus import load_records
from distributed_unlearn.errors import ConfigError, DataError

SECRET = "zanzibarium"
QUESTION_ROWS = [
    {"record_id": f"r{index}", "subject_id": f"s{index // 2}", "question": f"q{index}", "answer": f"a{index}"}
    for index in range(6)
]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def no_network(monkeypatch):
    attempts = []

    def deny(self, address):
        attempts.append(address)
        raise OSError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", deny)
    return attempts


def test_question_answer_jsonl(tmp_path, no_network):
    records = load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", QUESTION_ROWS)))
    assert [record.record_id for record in records] == [f"r{index}" for index in range(6)]
    assert records[3].subject_id == "s1"
    assert records[3].prompt == "Question: q3\nAnswer:" and records[3].answer == "a3" and records[3].messages is None
    assert no_network == []


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "folder"])
def test_every_local_kind_gives_the_same_records_without_network(tmp_path, no_network, kind):
    expected = load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", QUESTION_ROWS)))
    path = tmp_path / f"b.{kind}"
    if kind == "json":
        path.write_text(json.dumps(QUESTION_ROWS))
    elif kind == "csv":
        columns = list(QUESTION_ROWS[0])
        path.write_text("\n".join([",".join(columns), *(",".join(row.values()) for row in QUESTION_ROWS)]) + "\n")
    elif kind == "parquet":
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(QUESTION_ROWS).to_parquet(path)
        datasets.enable_progress_bars()
    else:
        path.mkdir()
        write_jsonl(path / "train.jsonl", QUESTION_ROWS)
    assert load_records(DataConfig(path=str(path))) == expected
    assert no_network == []


def test_split_names_and_slices_a_local_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", QUESTION_ROWS)
    assert len(load_records(DataConfig(path=path, split="train[:50%]"))) == 3
    assert len(load_records(DataConfig(path=path, split="test"))) == 6


def test_missing_id_column_numbers_the_rows(tmp_path):
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a"}]
    records = load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", rows)))
    assert [record.record_id for record in records] == ["row-0", "row-1"]
    assert [record.subject_id for record in records] == [None, None]


def test_whole_number_ids_become_text(tmp_path):
    rows = [
        {"record_id": 7, "subject_id": 12, "question": "q", "answer": "a"},
        {"record_id": 8, "subject_id": None, "question": "q", "answer": "a"},
    ]
    records = load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", rows)))
    assert [(record.record_id, record.subject_id) for record in records] == [("7", "12"), ("8", None)]


def test_whole_numbers_kept_as_floats_lose_no_spelling(tmp_path):
    datasets.disable_progress_bars()
    columns = {"record_id": [7, 8], "subject_id": [12.0, None], "question": ["q", "q"], "answer": ["a", "a"]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "a.parquet")
    datasets.enable_progress_bars()
    records = load_records(DataConfig(path=str(tmp_path / "a.parquet")))
    assert [record.subject_id for record in records] == ["12", None]


def test_no_copy_of_the_records_stays_in_a_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", QUESTION_ROWS)))
    assert list(cache.rglob("*")) == []


def test_csv_values_are_never_rewritten(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("record_id,subject_id,question,answer\n007,012,NA,1912\n008,,b,1913\n")
    first, second = load_records(DataConfig(path=str(path), prompt_template="{prompt}"))
    assert (first.record_id, first.subject_id, first.prompt, first.answer) == ("007", "012", "NA", "1912")
    assert (second.record_id, second.subject_id) == ("008", None)


def test_template_may_hold_other_braces(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "{q}", "answer": "a"}])
    record = load_records(DataConfig(path=path, prompt_template="{json} {prompt} {}"))[0]
    assert record.prompt == "{json} {q} {}"
    with pytest.raises(ConfigError, match=r"prompt_template.*\{prompt\}"):
        load_records(DataConfig(path=path, prompt_template="no slot"))


def test_text_is_all_answer(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "all of it"}])
    record = load_records(DataConfig(path=path, format="text"))[0]
    assert (record.prompt, record.answer) == ("", "all of it")


def test_chat_keeps_messages(tmp_path):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    record = load_records(DataConfig(path=path, format="chat"))[0]
    assert record.messages == tuple(messages) and record.answer == "good day"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": SECRET}],
        [{"role": "assistant", "content": SECRET}, {"role": "user", "content": SECRET}],
        [{"role": "user", "content": None}, {"role": "assistant", "content": SECRET}],
        [],
    ],
)
def test_chat_without_a_last_answer_is_refused(tmp_path, messages):
    good = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET}]
    rows = [{"record_id": "good", "messages": good}, {"record_id": "bad", "messages": messages}]
    with pytest.raises(DataError, match="'bad'.*last one by the assistant") as caught:
        load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", rows), format="chat"))
    assert SECRET not in str(caught.value)


def test_classification_labels(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "good film", "label": 1}, {"text": "bad film", "label": 0}])
    config = DataConfig(path=path, format="classification", label_names=("negative", "positive"))
    assert [record.answer for record in load_records(config)] == ["positive", "negative"]
    assert load_records(config)[0].prompt == "Question: good film\nAnswer:"
    own_text = DataConfig(path=path, format="classification")
    assert [record.answer for record in load_records(own_text)] == ["1", "0"]
    with pytest.raises(DataError, match="label 1 in record 'row-0'.*0 to 0"):
        load_records(DataConfig(path=path, format="classification", label_names=("only",)))


def test_classification_uses_names_the_data_set_declares(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.disable_progress_bars()
    rows = {"text": ["a", "b"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    datasets.enable_progress_bars()
    records = load_records(DataConfig(path=str(tmp_path / "a.parquet"), format="classification"))
    assert [record.answer for record in records] == ["yes", "no"]


@pytest.mark.parametrize("name", ["gone.jsonl", "gone", "gone.csv"])
def test_missing_path_is_refused_without_network(tmp_path, no_network, name):
    with pytest.raises(DataError, match="does not exist.*data.path"):
        load_records(DataConfig(path=str(tmp_path / name)))
    assert no_network == []


def test_relative_file_name_is_not_taken_for_a_hub_name(no_network):
    with pytest.raises(DataError, match="does not exist"):
        load_records(DataConfig(path="people/gone.jsonl"))
    assert no_network == []


def test_bad_files_are_refused_without_their_text(tmp_path, capfd, caplog):
    (tmp_path / "a.txt").write_text(SECRET)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "ragged.csv").write_text(f"question,answer\na,b\n{SECRET},c,d,{SECRET}\n")
    (tmp_path / "torn.jsonl").write_text(f'{{"question": "{SECRET}", "answer": \n')
    reasons = {"a.txt": "suffix", "empty.jsonl": "which is empty", "ragged.csv": "line 3", "torn.jsonl": "line 1"}
    for name, message in reasons.items():
        with pytest.raises(DataError, match=message) as caught:
            load_records(DataConfig(path=str(tmp_path / name)))
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is None, "the cause would bring the text back in a traceback"
    output = capfd.readouterr()
    assert output.out + output.err + caplog.text == "", "`datasets` logs reasons, which may quote the file"


def test_missing_column_names_what_there_is(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": SECRET, "reply": SECRET}])
    with pytest.raises(DataError, match="no column 'answer'.*'question', 'reply'.*_field") as caught:
        load_records(DataConfig(path=path))
    assert SECRET not in str(caught.value)


def test_null_and_untyped_fields_are_refused(tmp_path):
    null = [{"record_id": "w", "question": "q", "answer": "a"}, {"record_id": "x", "question": None, "answer": SECRET}]
    with pytest.raises(DataError, match="NoneType in column 'question' of record 'x'") as caught:
        load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", null)))
    assert SECRET not in str(caught.value)
    number = [{"record_id": "w", "question": SECRET, "answer": 3}]
    with pytest.raises(DataError, match="int in column 'answer' of record 'w'"):
        load_records(DataConfig(path=write_jsonl(tmp_path / "b.jsonl", number)))


def test_ids_that_would_be_respelt_or_are_missing_are_refused(tmp_path):
    dates = [{"record_id": "2021-01-01", "question": "q", "answer": "a"}]
    assert load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", dates)))[0].record_id == "2021-01-01"
    for odd in (1.5, True, ["r1"], "x" * 501, "\ud800"):
        rows = [{"record_id": odd, "question": "q", "answer": "a"}]
        with pytest.raises(DataError, match="in column 'record_id', line 1 of"):
            load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", rows)))
    missing = [{"record_id": "x", "question": "q", "answer": "a"}, {"record_id": None, "question": "q", "answer": "a"}]
    with pytest.raises(DataError, match="no id in column 'record_id', line 2 of"):
        load_records(DataConfig(path=write_jsonl(tmp_path / "b.jsonl", missing)))


def test_duplicate_ids_are_refused_naming_five_at_most(tmp_path):
    rows = [{"record_id": f"r{index % 7}", "question": SECRET, "answer": "a"} for index in range(14)]
    with pytest.raises(DataError, match="7 record id.*more than once") as caught:
        load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", rows)))
    assert str(caught.value).count("'r") == 5 and SECRET not in str(caught.value)


def test_progress_bars_stay_as_the_caller_had_them(tmp_path, capfd):
    datasets.enable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    load_records(DataConfig(path=write_jsonl(tmp_path / "a.jsonl", QUESTION_ROWS)))
    assert not datasets.are_progress_bars_disabled() and datasets.logging.get_verbosity() == verbosity
    assert "examples" not in capfd.readouterr().err


def test_rows_without_ids_are_called_the_same_in_every_slice(tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"a{i}"}) + "\n" for i in range(8)))
    for split, numbers in (("train", range(8)), ("train[2:5]", (2, 3, 4)), ("train[:2]+train[6:]", (0, 1, 6, 7))):
        found = load_records(DataConfig(path=str(path), split=split))
        assert [(record.record_id, record.answer) for record in found] == [(f"row-{i}", f"a{i}") for i in numbers]
