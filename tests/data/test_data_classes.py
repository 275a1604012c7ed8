"""Texts with classes: tokens and labels, the padding that a classifier finds the end by, and selection by class."""

import json

import numpy as np
import pytest
import torch

from distributed_unlearn.config import DataConfig, ModelConfig, SelectionConfig, parse_job
from distributed_unlearn.data.classes import LabelledCorpus
from distributed_unlearn.data.prepare import prepare_data
from distributed_unlearn.errors import ConfigError, DataError, ModelError
from tests.classifiers import tiny_classifier
from tests.engine.checkpoints import word_tokenizer

ROWS = [("w3 w4 w5", "b"), ("w6", "a"), ("w7 w8", "1"), ("w9 w3 w3 w3", "c"), ("w4 w4", "a"), ("w5", "b")]


@pytest.fixture
def job(tmp_path):
    """A llama classifier of three classes with its tokenizer, and six labelled texts."""
    model = tiny_classifier("llama")
    model.resize_token_embeddings(67)
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    lines = (json.dumps({"text": text, "label": label, "record_id": f"r{i}"}) for i, (text, label) in enumerate(ROWS))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def prepare(folder, forget, holdout=None, **settings):
    model = ModelConfig(path=str(folder / "model"), task="sequence_classification")
    data = DataConfig(path=str(folder / "texts.jsonl"), format="classification", **settings)
    return prepare_data(model, data, [SelectionConfig(**forget)], holdout)


def test_texts_become_tokens_and_classes(job):
    prepared = prepare(job, {"record_ids": ("r0",)})
    corpus = prepared.corpus
    assert isinstance(corpus, LabelledCorpus) and corpus.record_ids == tuple(f"r{i}" for i in range(6))
    batch = corpus.batch(np.array([3, 1]))
    assert batch.labels.tolist() == [2, 0] and batch.record.tolist() == [0, 1] and batch.num_rows == 2
    assert batch.inputs["input_ids"].tolist() == [[9, 3, 3, 3], [6, 0, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert corpus.labels.classes.tolist() == [1, 0, 1, 2, 0, 1]
    empty = corpus.batch(np.array([], dtype=np.int64))
    assert empty.num_rows == 1 and len(empty.labels) == 0 and empty.inputs["attention_mask"].sum() == 1


def test_padding_does_not_change_a_prediction(job):
    corpus = prepare(job, {"record_ids": ("r0",)}).corpus
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(job / "model").eval()
    with torch.no_grad():
        together = model(**corpus.batch(np.arange(6)).inputs).logits
        alone = torch.cat([model(**corpus.batch(np.array([i])).inputs).logits for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_class_is_selected_by_name_or_number_and_spares_the_holdout(job):
    for value in ("a", 0):
        assert prepare(job, {"classes": (value,)}).partition.forget_rounds[0].tolist() == [1, 4]
    holdout = SelectionConfig(record_ids=("r4",))
    partition = prepare(job, {"classes": ("a",), "record_ids": ("r3",)}, holdout).partition
    assert partition.forget_rounds[0].tolist() == [1, 3] and partition.holdout.tolist() == [4]
    for unknown in ("d", 3, -1):
        with pytest.raises(DataError, match="1 unknown class"):
            prepare(job, {"classes": (unknown,)})


def test_labels_are_looked_up_in_label_names_first(job):
    assert prepare(job, {"record_ids": ("r0",)}, label_names=("c", "b", "a")).corpus.labels.classes.tolist() == [
        1, 2, 1, 0, 2, 1,
    ]  # fmt: skip
    with pytest.raises(DataError, match="a label of 1 characters in record 'r3'"):
        prepare(job, {"record_ids": ("r0",)}, label_names=("a", "b", "x"))


def test_long_texts_follow_the_policy(job):
    with pytest.raises(DataError, match="1 of 7 records longer than 8 tokens"):
        _lengthen(job)
        prepare(job, {"record_ids": ("r0",)}, max_length=8)
    cut = prepare(job, {"record_ids": ("r0",)}, max_length=8, too_long="truncate")
    assert cut.report.num_truncated == 1 and cut.report.longest == 12
    assert cut.corpus.lengths(np.array([6])).tolist() == [8]
    dropped = prepare(job, {"record_ids": ("r0",)}, max_length=8, too_long="drop")
    assert dropped.report.num_dropped == 1 and dropped.corpus.num_records == 6
    with pytest.raises(DataError, match="to be forgotten that are longer"):
        prepare(job, {"record_ids": ("long",)}, max_length=8, too_long="drop")
    with pytest.raises(DataError, match="to be forgotten that are longer"):
        prepare(job, {"classes": ("a",)}, max_length=8, too_long="drop")


def _lengthen(folder):
    with (folder / "texts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "w3 " * 12, "label": "a", "record_id": "long"}) + "\n")


def test_an_empty_text_is_refused(job):
    with (job / "texts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": " ", "label": "a", "record_id": "blank"}) + "\n")
    with pytest.raises(DataError, match="1 record.s. without text, e.g. 'blank'"):
        prepare(job, {"record_ids": ("r0",)})


@pytest.mark.parametrize("known", [None, 2])
def test_a_classifier_that_knows_another_padding_is_refused(job, known):
    path = job / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": known}))
    with pytest.raises(ModelError, match=f"pad_token_id {known}.*padded with 0"):
        prepare(job, {"record_ids": ("r0",)})


def tree(**sections):
    data = {"path": "x", "format": "image"}
    base = {"model": {"path": "m", "task": "image_classification"}, "data": data, "output": "o"}
    return base | {"forget": {"classes": [1, "cat"]}, "solver": {"stop": {"forget_matches_holdout": False}}} | sections


def test_task_and_format_must_agree():
    objective = {"name": "retain"}
    job = parse_job(tree(objective=objective), "test")
    assert job.forget is not None and job.forget.classes == (1, "cat")
    for task, data, complaint in (
        ("image_classification", {"path": "x"}, "needs data.format image"),
        ("sequence_classification", {"path": "x", "format": "image"}, "needs data.format classification"),
        ("causal_lm", {"path": "x", "format": "image"}, "needs model.task image_classification"),
        ("causal_lm", {"path": "x"}, "classes select records of a classifier"),
        ("image_classification", {"path": "x", "format": "image", "prompt_template": "{prompt}"}, "has no meaning"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            parse_job(tree(model={"path": "m", "task": task}, data=data, objective=objective), "test")
