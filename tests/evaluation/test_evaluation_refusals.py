"""Whatever a metric lacks is refused with one clear sentence, or listed with what it lacks; never replaced."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from distributed_unlearn.data.perturbed import PerturbedFields, load_perturbed, mean_losses_of
from distributed_unlearn.errors import ConfigError, DataError, ModelError
from distributed_unlearn.evaluation.needs import wanted_metrics
from distributed_unlearn.evaluation.session import checkpoint_hash, prepare_evaluation
from tests.tiny_job import save_model

FIELDS = PerturbedFields("question", "answer", "paraphrased_answer", "perturbed_answer")


@pytest.mark.parametrize(
    ("metric", "sections", "complaint"),
    [
        ("tug_of_war", {}, r"tug_of_war without a retrained reference \(`retrained`\)"),
        ("divergence", {}, "divergence without a retrained reference"),
        ("priv_leak", {}, "priv_leak without a retrained reference"),
        ("membership", {"holdout": None}, "membership without a holdout set"),
        ("truth_ratio", {}, r"truth_ratio without files of paraphrased and wrong answers"),
        ("forget_quality", {"perturbed": {"retain": "r.jsonl"}}, "forget_quality without wrong answers for the forget"),
        ("model_utility", {}, "model_utility without wrong answers for retain set"),
        ("rouge", {}, "rouge without generation switched on"),
        ("depth", {}, "depth without the section `depth`"),
        ("relearned", {}, r"relearned without the section `stress.relearn`"),
    ],
)
def test_a_named_metric_that_lacks_something_is_refused_before_anything_is_read(
    evaluated, tmp_path, metric, sections, complaint
):
    config = evaluated.config(tmp_path, metrics=[metric], **sections)
    with pytest.raises(ConfigError, match=complaint):
        wanted_metrics(config)


def test_what_was_not_named_is_listed_with_what_it_lacks(evaluated, tmp_path):
    wanted, lacking = wanted_metrics(evaluated.config(tmp_path))
    assert wanted == {"memorisation", "membership", "holdout_distance"}
    assert (
        next(item.why for item in lacking if item.name == "tug_of_war") == "needs a retrained reference (`retrained`)"
    )
    assert {item.name for item in lacking} >= {
        "divergence",
        "rouge",
        "depth",
        "quantised",
        "gibberish",
        "model_utility",
    }


def test_a_missing_reference_is_refused(evaluated, tmp_path):
    with pytest.raises(ModelError, match="which is no folder"):
        prepare_evaluation(evaluated.config(tmp_path, retrained=str(tmp_path / "nowhere")))


def test_a_reference_with_another_tokenizer_is_refused(evaluated, tmp_path):
    other = evaluated.tiny.copy_model(tmp_path / "other")
    tree = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words = tree["model"]["vocab"]
    first, second = [word for word in words if words[word] in (100, 101)]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ModelError, match="another tokenizer"):
        prepare_evaluation(evaluated.config(tmp_path, retrained=str(other)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"perturbed_answer": None}, r"question 2 of .* without wrong answers in 'perturbed_answer', which the truth"),
        ({"perturbed_answer": []}, "question 2 of .* without wrong answers"),
        ({"perturbed_answer": ["x", 3]}, "question 2 of .* without wrong answers"),
        ({"paraphrased_answer": " "}, "question 2 of .* without text in 'paraphrased_answer'"),
        ({"question": None}, "question 2 of .* without text in 'question'"),
    ],
)
def test_wrong_answers_that_the_data_lacks_are_refused_without_a_word_of_it(evaluated, tmp_path, change, complaint):
    rows = [json.loads(line) for line in evaluated.path("forget.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[1] |= change
    path = tmp_path / "spoilt.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=complaint) as caught:
        prepare_evaluation(evaluated.config(tmp_path, perturbed={"forget": str(path)}))
    assert rows[1]["answer"] not in str(caught.value) and str(rows[1]["question"]) not in str(caught.value)


def test_wrong_answers_about_other_records_are_refused(evaluated, tmp_path):
    with pytest.raises(DataError, match="record ids are none of the forget set's"):
        prepare_evaluation(evaluated.config(tmp_path, perturbed={"forget": str(evaluated.path("retain.jsonl"))}))


def test_relearning_all_of_the_forget_set_leaves_nothing_to_score(evaluated, tmp_path):
    stress = {"relearn": {"num_records": 3}}
    with pytest.raises(DataError, match=r"stress.relearn of 3 record\(s\) and a forget set of 3"):
        prepare_evaluation(evaluated.config(tmp_path, stress=stress))


def test_a_second_reference_without_a_first_is_refused(evaluated, tmp_path):
    with pytest.raises(ConfigError, match="retrained_again without retrained"):
        evaluated.config(tmp_path, retrained_again="x")


def test_questions_may_have_different_numbers_of_wrong_answers(evaluated, tmp_path):
    path = tmp_path / "ragged.jsonl"
    lines = [
        {"question": "a", "answer": "b", "perturbed_answer": "c"},
        {"question": "d", "answer": "e", "perturbed_answer": ["f", "g"]},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(evaluated.tiny.model)
    plain = PerturbedFields("question", "answer", None, "perturbed_answer")
    found = load_perturbed(path, plain, "{prompt}", tokenizer, 64)
    assert (found.wrong >= 0).sum(1).tolist() == [1, 2] and (found.right == found.answers).all()
    losses = np.arange(found.corpus.num_records, dtype=float)
    assert np.isnan(mean_losses_of(losses, found.wrong)[0, 1])


def test_a_checkpoints_hash_is_of_its_content(evaluated, tmp_path):
    model = evaluated.config(tmp_path).model
    copy = evaluated.tiny.copy_model(tmp_path / "copy")
    same = model.model_copy(update={"path": str(copy)})
    assert checkpoint_hash(same) == checkpoint_hash(model)
    save_model(copy, torch.bfloat16)
    assert checkpoint_hash(same) != checkpoint_hash(model)
