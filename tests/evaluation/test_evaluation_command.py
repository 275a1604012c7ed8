"""`evaluate`: values against plain modules and other packages, what is written, the cache, and what it never writes."""

import json
import math

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.spatial.distance import jensenshannon
from transformers import AutoModelForCausalLM, AutoTokenizer

from distributed_unlearn.cli import main
from distributed_unlearn.commands.evaluate import evaluate_checkpoint
from distributed_unlearn.errors import DataError
from distributed_unlearn.records.evaluation import read_evaluation
from tests.tiny_job import FORGET, HOLDOUT

BRIEF = {"metrics": ["memorisation", "membership", "priv_leak", "holdout_distance", "tug_of_war", "divergence"]}
EVERYTHING = {
    "generation": {"max_new_tokens": 6, "verbatim_tokens": 4, "knowledge_tokens": 4, "num_examples": 1},
    "depth": {},
    "stress": {
        "quantise": {"group_size": 8},
        "relearn": {"num_records": 1, "epochs": 2, "batch_size": 1, "learning_rate": 0.01},
    },
}


class NoGroup:
    """Workers that nobody may call: everything must come from the cache."""

    world_size = 1

    def call_all(self, method, *arguments):
        raise AssertionError(f"{method} was asked of the workers")

    call_rank_zero = share = call_all


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def references(evaluated):
    return {"retrained": str(evaluated.path("retrained")), "retrained_again": str(evaluated.path("again"))}


@pytest.fixture(scope="module")
def brief(evaluated, references, output):
    return evaluate_checkpoint(evaluated.config(output / "brief", **BRIEF, **references))


class Plain:
    """A checkpoint of transformers by itself, one record at a time, in float64."""

    def __init__(self, evaluated, name="model"):
        self.tokenizer = AutoTokenizer.from_pretrained(evaluated.tiny.model)
        self.model = AutoModelForCausalLM.from_pretrained(evaluated.path(name)).double().eval()

    def distributions(self, row, answer=None):
        """[L, V] log-probabilities at the answer, and its tokens."""
        prompt = f"Question: {row['question']}\nAnswer:"
        whole = self.tokenizer(f"{prompt} {row['answer'] if answer is None else answer}", return_offsets_mapping=True)
        ids, offsets = list(whole["input_ids"]), whole["offset_mapping"]
        start = next(i for i, (_, end) in enumerate(offsets) if end > len(prompt))
        ids += [] if ids[-1] == self.tokenizer.eos_token_id else [self.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        return torch.log_softmax(logits, 1).numpy(), np.array(ids[start:])

    def loss(self, row, answer=None):
        log_p, labels = self.distributions(row, answer)
        return -log_p[np.arange(len(labels)), labels].mean()


def rows_of(evaluated, subjects):
    return [row for row in evaluated.tiny.rows() if row["subject_id"] in subjects]


def test_losses_and_divergences_are_those_of_plain_modules(evaluated, brief):
    plain, retrained, again = (Plain(evaluated, name) for name in ("model", "retrained", "again"))
    rows = rows_of(evaluated, FORGET)
    loss = brief.find("loss", "forget")
    assert loss.value == pytest.approx(np.mean([plain.loss(row) for row in rows]), rel=1e-4)
    assert loss.retrained == pytest.approx(np.mean([retrained.loss(row) for row in rows]), rel=1e-4)
    assert loss.low <= loss.value <= loss.high and loss.num_records == len(rows)

    def divergence(first, second):
        pairs = [(first.distributions(row)[0], second.distributions(row)[0]) for row in rows]
        return np.mean([(jensenshannon(np.exp(p), np.exp(q), axis=1) ** 2).mean() for p, q in pairs])

    found = brief.find("jensen_shannon", "forget")
    assert found.value == pytest.approx(divergence(plain, retrained), rel=1e-3)
    assert found.noise_floor == pytest.approx(divergence(again, retrained), rel=1e-3)


def test_membership_and_closeness_are_made_of_the_same_numbers(evaluated, brief):
    plain = Plain(evaluated)
    forget = [plain.loss(row) for row in rows_of(evaluated, FORGET)]
    holdout = [plain.loss(row) for row in rows_of(evaluated, HOLDOUT)]
    expected = np.mean([[f < h for h in holdout] for f in forget])
    assert brief.find("mia_auc_loss", "forget").value == pytest.approx(expected)
    gaps = [brief.find("exact_memorisation", name) for name in ("forget", "retain", "holdout")]
    product = math.prod(1 - abs(row.value - row.retrained) for row in gaps)
    assert brief.find("tug_of_war", "all").value == pytest.approx(product)
    auc = brief.find("mia_auc_min_k", "forget")
    assert brief.find("priv_leak", "forget").value == pytest.approx(
        100 * (auc.retrained - auc.value) / (1 - auc.retrained)
    )


def test_what_is_written_loads_back_with_pictures_and_their_numbers(brief, output):
    assert read_evaluation(output / "brief" / "evaluation.json") == brief
    pictures = output / "brief" / "pictures"
    for name in ("forget", "retain", "holdout"):
        assert (pictures / f"losses_{name}.svg").read_text().lstrip().startswith("<?xml")
        first, second, *_ = (pictures / f"losses_{name}.csv").read_text().splitlines()
        assert first.startswith("share_of_records,model_loss_nats_per_token,retrained_loss") and second.startswith(
            "0.0,"
        )
    with pytest.raises(DataError, match="no rouge_l_recall on 'forget'"):
        brief.find("rouge_l_recall", "forget")


def test_nothing_is_measured_twice(evaluated, references, output, brief):
    again = evaluate_checkpoint(evaluated.config(output / "brief", **BRIEF, **references), group=NoGroup())
    assert again.rows == brief.rows and again.num_cached == 9  # three models, three sets
    with pytest.raises(AssertionError, match="was asked of the workers"):
        changed = references | {"retrained": str(evaluated.path("again")), "retrained_again": None}
        evaluate_checkpoint(evaluated.config(output / "brief", **BRIEF, **changed), group=NoGroup())


def test_a_damaged_cache_entry_is_measured_again(evaluated, references, output, brief):
    victim = sorted((output / "brief" / "cache").glob("*.npz"))[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    again = evaluate_checkpoint(evaluated.config(output / "brief", **BRIEF, **references))
    assert again.num_cached == 8 and [row.name for row in again.rows] == [row.name for row in brief.rows]
    assert again.find("loss", "forget").value == pytest.approx(brief.find("loss", "forget").value, rel=1e-12)


@pytest.mark.slow
def test_everything_at_once_from_the_command_line(evaluated, references, tmp_path, capsys):
    perturbed = {name: str(evaluated.path(f"{name}.jsonl")) for name in ("forget", "retain")}
    perturbed |= {name: str(evaluated.path("facts.jsonl")) for name in ("real_authors", "world_facts")}
    file = tmp_path / "evaluate.yaml"
    file.write_text(
        json.dumps(evaluated.tree(tmp_path / "out", **references, **EVERYTHING, perturbed=perturbed)), encoding="utf-8"
    )
    assert main(["evaluate", str(file), "num_resamples=120"]) == 0
    printed = capsys.readouterr().out
    last = json.loads(printed.strip().splitlines()[-1])
    record = read_evaluation(tmp_path / "out" / "evaluation.json")
    assert last["values"].keys() == {".".join(filter(None, (r.name, r.set_name, r.condition))) for r in record.rows}
    assert {item.name for item in record.not_measured} == {"gibberish"}
    joined = " ".join(printed.split())
    assert all(" ".join(row.sentence.split()) in joined for row in record.rows)
    _check_truth(evaluated, record)
    _check_written(evaluated, record)
    assert record.find("loss", "forget", "after learning 1 forget record(s) again").num_records == 2
    assert record.find("loss", "forget", "after rounding to 4 bits").value != record.find("loss", "forget").value
    assert set(record.depth_by_block) == {"forget", "retain", "holdout"} and len(record.depth_by_block["forget"]) == 2
    _check_privacy(evaluated, tmp_path / "out", printed)


def _check_truth(evaluated, record):
    plain, ratios = Plain(evaluated), []
    for row in rows_of(evaluated, FORGET):
        wrong = np.mean([plain.loss(row, text) for text in ("It is Bob", "It is not known")])
        ratios.append(math.exp(-wrong) / (math.exp(-plain.loss(row, f"It is {row['answer']}")) + 1e-10))
    expected = np.mean([min(ratio, 1 / ratio) for ratio in ratios])
    assert record.find("truth_ratio", "forget").value == pytest.approx(expected, rel=1e-4)
    assert (
        "geometric" in record.find("truth_ratio", "forget").note
        and "D = " in record.find("forget_quality", "forget").note
    )


def _check_written(evaluated, record):
    tokenizer = AutoTokenizer.from_pretrained(evaluated.tiny.model)
    model = AutoModelForCausalLM.from_pretrained(evaluated.tiny.model, attn_implementation="eager").eval()
    scorer, recalls = RougeScorer(["rougeL"], use_stemmer=True), []
    for row in rows_of(evaluated, HOLDOUT):
        ids = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt")["input_ids"]
        ids = ids[:, :-1] if ids[0, -1] == tokenizer.eos_token_id else ids
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        recalls.append(scorer.score(row["answer"], text)["rougeL"].recall)
    assert record.find("rouge_l_recall", "holdout").value == pytest.approx(np.mean(recalls))


def _check_privacy(evaluated, folder, printed):
    """No answer in the clear, in any file or on the console; ids of those to be forgotten neither."""
    answers = [row["answer"] for row in evaluated.tiny.rows()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".npz" for path in files)
    for text in (printed, *(path.read_bytes().decode("utf-8", "replace") for path in files)):
        assert not any(answer in text for answer in answers if len(answer) > 6)
        assert not any(subject in text for subject in FORGET)
