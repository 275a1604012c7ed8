"""Classifiers of texts and images on 1, 2 and 4 ranks at stages 0 and 3, against forward over reverse in float64."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distributed_unlearn.curvature.precision import LiftFloat32Casts
from distributed_unlearn.curvature.reference import frozen_rows
from tests.classifiers import (
    NUM_BLOCKS,
    NUM_CLASSES,
    NUM_RECORDS,
    TASKS,
    corpus_for,
    tiny_classifier,
    whole_loss,
    write_classifiers,
)
from tests.dense import FreeEntries, forward_over_reverse
from tests.engine.classifier_programs import TRAINING, ClassifierPlan
from tests.engine.compare import SUMS, Results, close, close_vectors, gathered
from tests.engine.ranks import run_on_ranks

WORLD_SIZES = (1, 2, pytest.param(4, marks=pytest.mark.slow))
WAYS = ("stage 0 recompute", "stage 3 cached", "stage 3 recompute")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    checkpoints = tmp_path_factory.mktemp("classifiers")
    write_classifiers(checkpoints)

    def run(world_size, folder):
        plan = ClassifierPlan(checkpoints, checks=world_size == 2)
        return run_on_ranks("tests.engine.classifier_programs:run_classifiers", world_size, folder, plan)

    return Results(tmp_path_factory.mktemp("ranks"), run)


@pytest.fixture(scope="module")
def truths(results):
    """Loss, gradient and product in float64, by name; the direction is the same for all ranks and stages."""
    known = {}

    def truth(name):
        if name not in known:
            direction = gathered(results.of(1, f"{name} stage 0 recompute"), "vector")
            model, loss = tiny_classifier(name).double(), whole_loss(name)
            entries = FreeEntries(model, list(direction), frozen_rows(model))
            with LiftFloat32Casts():
                value, bound = loss(model), entries.bind(loss)
                gradient = torch.func.grad(bound)(entries.point)
                tangent = entries.flatten({key: part.double() for key, part in direction.items()})
                known[name] = entries, float(value), gradient, forward_over_reverse(entries, loss, tangent)
        return known[name]

    return truth


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", TASKS)
def test_loss_gradient_and_product(name, world_size, way, results, truths):
    entries, loss, gradient, product = truths(name)
    ranks = results.of(world_size, f"{name} {way}")
    facts = ranks[0]["facts"]
    assert facts.num_segments == 1 + NUM_BLOCKS[name] and facts.segment_fallback is None
    assert (facts.num_batch_norms > 0) == (name == "resnet")
    close(ranks[0]["loss"], loss, SUMS, "loss")
    close_vectors(entries.flatten(gathered(ranks, "gradient")), gradient, SUMS, "gradient")
    close_vectors(entries.flatten(gathered(ranks, "hvp")), product, SUMS, "product")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", TASKS)
def test_scores(name, world_size, results):
    scores, corpus = results.of(world_size, f"scores {name}")[0], corpus_for(name)
    model = tiny_classifier(name).double()
    with torch.no_grad():
        batches = [corpus.batch(np.array([index])) for index in range(NUM_RECORDS)]
        inputs = [{k: v.double() if v.is_floating_point() else v for k, v in b.inputs.items()} for b in batches]
        logits = torch.cat([model(**one).logits for one in inputs])
    classes = torch.from_numpy(corpus.classes)
    expected = torch.nn.functional.cross_entropy(logits, classes, reduction="none").numpy()
    assert scores.indices.tolist() == list(range(NUM_RECORDS)) and set(scores.num_tokens) == {1}
    assert np.abs(scores.nll - expected).max() < SUMS * expected.max()
    hits = (logits.argmax(1) == classes).long()
    assert scores.num_correct.tolist() == hits.tolist() and 0 < hits.sum() < NUM_RECORDS


@pytest.mark.parametrize("name", TASKS)
def test_the_built_in_check_passes(name, results):
    report = results.of(2, f"check {name}")[0]
    assert max(report.loss_relative_error, report.gradient_relative_error, report.hvp_relative_error) < SUMS
    assert report.symmetry_error < SUMS and report.segments == 1 + NUM_BLOCKS[name]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_training_leaves_running_statistics_alone_and_does_not_depend_on_ranks(world_size, stage, results):
    found = results.of(world_size, f"training resnet {stage}")[0]
    start = dict(tiny_classifier("resnet").state_dict())
    model, corpus = tiny_classifier("resnet").double(), corpus_for("resnet")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": TRAINING.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=TRAINING.learning_rate)
    pixels, classes = torch.from_numpy(corpus.values).double(), torch.from_numpy(corpus.classes)
    loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, classes)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.max_gradient_norm)
    optimizer.step()
    close(found["loss"], float(loss), SUMS, "loss")
    saved = load_file(found["folder"] / "model.safetensors")
    assert saved.keys() == start.keys()
    for name, value in model.state_dict().items():
        if "running" in name or "tracked" in name:
            assert torch.equal(saved[name], start[name]), name
            assert saved[name].dtype == start[name].dtype
        else:
            # The first step of AdamW is the sign of the gradient times the rate: where a gradient is nearly zero, its
            # rounding decides. So the mean is compared.
            error = (saved[name].double() - value).abs().mean() / TRAINING.learning_rate
            assert error < 1e-2, f"{name}: {float(error):.1e}"
    assert len(found["scores"].nll) == NUM_RECORDS and NUM_CLASSES > 1
