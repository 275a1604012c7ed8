"""`evaluate` on a classifier of images: accuracy, not memorised tokens; what has no meaning there is not measured."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import ViTImageProcessor

from distributed_unlearn.commands.evaluate import evaluate_checkpoint
from distributed_unlearn.config import parse_evaluation
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.evaluation.needs import wanted_metrics
from distributed_unlearn.models.cnn import TwoLayerCNNConfig, TwoLayerCNNForImageClassification

NUM_MAIN, NUM_HELD, CLASSES = 60, 20, (3, 7)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    names = {number: str(number) for number in range(10)}
    for seed, name in enumerate(("model", "retrained")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = TwoLayerCNNConfig(image_size=8, first_channels=3, second_channels=4, id2label=names)
            TwoLayerCNNForImageClassification(config).save_pretrained(folder / name)
        processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
        processor.save_pretrained(folder / name)
    return folder


def settings(networks, output, **sections):
    tree = {
        "model": {"path": str(networks / "model"), "task": "image_classification"},
        "data": {"path": "sklearn:digits", "split": f"train[:{NUM_MAIN}]", "format": "image"},
        "holdout": {"path": "sklearn:digits", "split": f"train[{NUM_MAIN}:{NUM_MAIN + NUM_HELD}]"},
        "forget": {"classes": list(CLASSES)},
        "retrained": str(networks / "retrained"),
        "cluster": {"backend": "in_process", "num_workers": 1, "zero_stage": 3, "use_gpu": "never"},
        "num_resamples": 100,
        "output": str(output),
    }
    return parse_evaluation(tree | sections, "test")


def predicted(networks, name):
    """Whether each of the first digits is recognised, by the plain network."""
    digits = load_digits()
    images = torch.tensor(digits.images[: NUM_MAIN + NUM_HELD] * 255 / 16).round() / 255
    network = TwoLayerCNNForImageClassification.from_pretrained(networks / name).eval()
    with torch.no_grad():
        logits = network(pixel_values=((images - 0.5) / 0.5).float()[:, None]).logits
    return (logits.argmax(1).numpy() == digits.target[: len(images)]).astype(float), digits.target[: len(images)]


def test_accuracy_and_closeness_are_those_of_plain_networks(networks, tmp_path):
    record = evaluate_checkpoint(settings(networks, tmp_path))
    hits, labels = predicted(networks, "model")
    theirs, _ = predicted(networks, "retrained")
    main = np.arange(len(labels)) < NUM_MAIN
    forget = main & np.isin(labels, CLASSES)
    sets = {"forget": forget, "retain": main & ~forget, "holdout": ~main}
    closeness = 1.0
    for name, chosen in sets.items():
        row = record.find("exact_memorisation", name)
        assert row.title == "accuracy" and row.num_records == chosen.sum()
        assert row.value == pytest.approx(hits[chosen].mean())
        closeness *= 1 - abs(hits[chosen].mean() - theirs[chosen].mean())
    tug = record.find("tug_of_war", "all")
    assert tug.value == pytest.approx(closeness) and tug.note == "by accuracy"
    assert 0 < record.find("jensen_shannon", "forget").value < np.log(2)
    names = {row.name for row in record.rows}
    assert "mia_auc_loss" in names and not names & {"extraction_strength", "mia_auc_min_k", "mia_auc_zlib", "priv_leak"}
    why = {item.name: item.why for item in record.not_measured}
    assert why["rouge"].startswith("needs a causal language model")


def test_what_has_no_meaning_for_classes_is_refused(networks, tmp_path):
    with pytest.raises(ConfigError, match="priv_leak without a causal language model"):
        wanted_metrics(settings(networks, tmp_path, metrics=["priv_leak"]))
    with pytest.raises(ConfigError, match="data.format text with model.task image_classification"):
        settings(networks, tmp_path, data={"path": "x.jsonl", "format": "text"})
