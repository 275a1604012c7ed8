"""What is refused of checkpoint, tokenizer and records before a worker starts, and what a separate holdout file is."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_job import CONTEXT, TinyJob
from transformers import AutoConfig, AutoTokenizer

from distributed_unlearn.config import DataConfig, ModelConfig, SelectionConfig
from distributed_unlearn.data.prepare import PreparedData, prepare_data
from distributed_unlearn.errors import ConfigError, DataError, ModelError
from distributed_unlearn.models.checkpoint import find_commit, load_model_config

FORGET = SelectionConfig(subjects=("person-0000",))


def prepare(tiny: TinyJob, model: Path | None = None, holdout: SelectionConfig | None = None, **data: Any):
    path = ModelConfig(path=str(model or tiny.model))
    return prepare_data(path, DataConfig(path=str(tiny.records), **data), (FORGET,), holdout)


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


@pytest.fixture
def without_pad(tiny: TinyJob, tmp_path: Path) -> Path:
    """As Llama 3: neither the tokenizer nor the configuration names a pad token."""
    model = tiny.copy_model(tmp_path / "model")
    rewrite(model / "tokenizer_config.json", pad_token=None)
    assert AutoTokenizer.from_pretrained(model).pad_token_id is None
    return model


def test_a_pad_token_may_be_named(without_pad: Path, tiny: TinyJob):
    end = AutoTokenizer.from_pretrained(tiny.model).eos_token
    with pytest.raises(ModelError, match=f"no pad token.*set data.pad_token, e.g. to '{end}'"):
        prepare(tiny, without_pad)
    corpus = prepare(tiny, without_pad, pad_token=end).corpus
    assert corpus.pad_token_id == AutoTokenizer.from_pretrained(tiny.model).eos_token_id != 0
    assert (corpus.tokens == prepare(tiny).corpus.tokens).all()  # padding is no part of a record


def test_an_unknown_pad_token_is_refused(without_pad: Path, tiny: TinyJob):
    with pytest.raises(ConfigError, match="data.pad_token '<nothing>', which the tokenizer does not know"):
        prepare(tiny, without_pad, pad_token="<nothing>")


def test_tokens_beyond_the_vocabulary_are_refused(without_pad: Path, tiny: TinyJob):
    tokenizer = AutoTokenizer.from_pretrained(without_pad)
    size = AutoConfig.from_pretrained(without_pad).vocab_size
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(without_pad)
    with pytest.raises(ModelError, match=f"pad token reach id {size}; expected ids below .* {size}.*data.pad_token"):
        prepare(tiny, without_pad)
    rewrite(without_pad / "config.json", vocab_size=size // 2)
    with pytest.raises(ModelError, match=f"tokens of the records reach id .* size {size // 2}.*belongs to the check"):
        prepare(tiny, without_pad, pad_token=tokenizer.eos_token)


def test_ids_up_to_the_last_are_allowed(tiny: TinyJob, tmp_path):
    largest = int(prepare(tiny).corpus.tokens.max())
    model = tiny.copy_model(tmp_path / "model")
    rewrite(model / "config.json", vocab_size=largest + 1)
    prepare(tiny, model)
    rewrite(model / "config.json", vocab_size=largest)
    with pytest.raises(ModelError, match=f"reach id {largest}; expected ids below the model's vocabulary size"):
        prepare(tiny, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "zzz"}, "model_type the installed transformers does not know.*update transformers"),
        (
            {"model_type": "zzz", "auto_map": {"AutoConfig": "configuration_zzz.Z"}},
            "needs code from its own repository.*remote code is never run",
        ),
        ({"model_type": None}, "without a config.json that names a model_type"),
    ],
    ids=["unknown", "remote_code", "none"],
)
def test_a_configuration_that_cannot_be_used_says_why(changes, message, tiny: TinyJob, tmp_path):
    model = tiny.copy_model(tmp_path / "model")
    rewrite(model / "config.json", **changes)
    with pytest.raises(ModelError, match=message) as caught:
        prepare(tiny, model)
    assert "trust_remote_code" not in str(caught.value)  # no remedy of ours


def test_a_broken_configuration_is_told_from_a_missing_model(tiny: TinyJob, tmp_path):
    model = tiny.copy_model(tmp_path / "model")
    (model / "config.json").write_text("{nope")
    with pytest.raises(ModelError, match="without a readable config.json"):
        load_model_config(ModelConfig(path=str(model)))


def test_a_hub_that_is_out_of_reach_says_so(monkeypatch):
    model = ModelConfig(path="nobody/nothing")
    with pytest.raises(ModelError, match="Hub is out of reach.*unset HF_HUB_OFFLINE"):
        find_commit(model)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(ModelError, match="Hub is out of reach.*check the network"):
        load_model_config(model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "is gated on the Hub.*HF_TOKEN"),
        ("RepositoryNotFoundError", "Hub does not have or does not show.*private.*HF_TOKEN"),
        ("RevisionNotFoundError", "without revision 'v9'.*model.revision"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(kind, message, monkeypatch):
    """As transformers raises them: an OSError from the Hub's own exception, whose type tells the cause."""
    import huggingface_hub.errors

    def refuse(*arguments: object, **settings: object) -> None:
        cause = getattr(huggingface_hub.errors, kind)
        raise OSError("We cannot load it. Pass a token.") from cause.__new__(cause)

    monkeypatch.setattr("distributed_unlearn.models.checkpoint.cached_file", refuse)
    monkeypatch.setattr("distributed_unlearn.models.checkpoint.AutoConfig.from_pretrained", refuse)
    model = ModelConfig(path="owner/model", revision="v9")
    for ask in (find_commit, load_model_config):
        with pytest.raises(ModelError, match=message):
            ask(model)


def _holdout_file(tmp_path: Path, tiny: TinyJob, words: int) -> Path:
    """Three records by strangers, the last of them with an answer of this many words."""
    path = tmp_path / "holdout.jsonl"
    rows = [
        {**row, "record_id": f"h{i}", "subject_id": "stranger", "answer": f"{row['answer']} Indeed."}
        for i, row in enumerate(tiny.rows()[:3])
    ]
    rows[-1]["answer"] = "so " * words
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_holdout_file_that_repeats_the_training_set_is_refused(tiny: TinyJob, tmp_path):
    rows = [{**row, "record_id": f"h{i}"} for i, row in enumerate(tiny.rows()[:3])]
    rows[0]["answer"] = "another"
    (tmp_path / "holdout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="2 of 3 record.*holdout file whose text is in the training set") as caught:
        prepare(tiny, holdout=SelectionConfig(path=str(tmp_path / "holdout.jsonl")))
    assert rows[1]["answer"] not in str(caught.value)


def _held(prepared: PreparedData) -> list[str]:
    return [prepared.corpus.record_ids[index] for index in prepared.partition.holdout]


def test_split_and_name_of_the_records_are_not_those_of_a_holdout_file(tiny: TinyJob, tmp_path):
    path = str(_holdout_file(tmp_path, tiny, 2))
    prepared = prepare(tiny, holdout=SelectionConfig(path=path), split="train[3:5]+train[:3]")
    assert _held(prepared) == ["h0", "h1", "h2"] and len(prepared.partition.training) == 5
    part = SelectionConfig(path=path, split="train[1:]")
    assert _held(prepare(tiny, holdout=part)) == ["h1", "h2"]


@pytest.mark.parametrize(("policy", "counts"), [("truncate", (1, 0)), ("drop", (0, 1))])
def test_what_happens_to_a_holdout_file_is_reported(policy, counts, tiny: TinyJob, tmp_path):
    holdout = SelectionConfig(path=str(_holdout_file(tmp_path, tiny, 3 * CONTEXT)))
    report = prepare(tiny, holdout=holdout, too_long=policy).report
    assert (report.num_truncated, report.num_dropped) == counts and report.longest > CONTEXT


@pytest.mark.parametrize("kind", ["record_ids", "ids_file", "subjects"])
def test_a_dropped_holdout_record_is_not_called_unknown(kind, tiny: TinyJob, tmp_path):
    long = "person-0004-00"
    rows = [row for row in tiny.rows() if row["subject_id"] != "person-0004" or row["record_id"] == long]
    for row in rows:
        row["answer"] = "so " * 3 * CONTEXT if row["record_id"] == long else row["answer"]
    records, ids = tmp_path / "records.jsonl", tmp_path / "ids"
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids.write_text(f"{long}\n")
    value = {"record_ids": (long,), "ids_file": str(ids), "subjects": ("person-0004",)}[kind]
    data = DataConfig(path=str(records), too_long="drop")
    with pytest.raises(DataError, match=f"1 record.s. to be held out.*longer than {CONTEXT} tokens.*'{long}'"):
        prepare_data(ModelConfig(path=str(tiny.model)), data, (FORGET,), SelectionConfig(**{kind: value}))
