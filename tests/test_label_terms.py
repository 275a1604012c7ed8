"""Random labels, SCRUB's and RMU's terms against loops over predictions, however a batch is cut."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from distributed_unlearn.config import ObjectiveConfig
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.objectives.constants import uniform_numbers
from distributed_unlearn.objectives.label_terms import other_labels
from distributed_unlearn.objectives.predictions import Constants, MinibatchTotals, Predictions
from distributed_unlearn.objectives.steering import control_vector

NUM_LABELS = 7
RECORD = [0, 0, 0, 1, 2, 2, 3, 3]
FORGET = [True, False, True, False]
TOTALS = MinibatchTotals(2, 2, 5, 3)


def _batch(chosen=range(8)):
    generator = torch.Generator().manual_seed(1)
    now, start = torch.randn(2, len(RECORD), NUM_LABELS, generator=generator, dtype=torch.float64)
    labels = torch.randint(NUM_LABELS, (len(RECORD),), generator=generator)
    uniform = torch.rand(len(RECORD), generator=generator, dtype=torch.float64)
    at, unread = torch.tensor(list(chosen), dtype=torch.int64), torch.full((len(chosen),), math.nan)
    record = torch.tensor(RECORD)[at]
    return Predictions(
        now[at],
        labels[at],
        record,
        torch.tensor(FORGET),
        Constants(unread, unread, unread, uniform[at]),
        start_logits=start[at],
    )


def _softmax(row):
    exponentials = [math.exp(value) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def _random_labels(batch):
    forget = retain = 0.0
    for logits, label, record, u in zip(batch.logits, batch.labels, batch.record, batch.constants.uniform, strict=True):
        p = _softmax(logits.tolist())
        others = [v for v in range(NUM_LABELS) if v != int(label)]
        if FORGET[int(record)]:
            forget -= math.log(p[others[int(float(u) * len(others))]]) / TOTALS.num_forget_tokens
        else:
            retain -= math.log(p[int(label)]) / TOTALS.num_retain_tokens
    return retain, forget


def _scrub(batch, weight):
    forget = retain = 0.0
    for logits, start, label, record in zip(batch.logits, batch.start_logits, batch.labels, batch.record, strict=True):
        p, q = _softmax(logits.tolist()), _softmax(start.tolist())
        divergence = sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True))
        if FORGET[int(record)]:
            forget -= divergence / TOTALS.num_forget_tokens
        else:
            retain += (weight * divergence - math.log(p[int(label)])) / TOTALS.num_retain_tokens
    return retain, forget


@pytest.mark.parametrize("name", ["random_labels", "scrub"])
def test_value_is_the_loop_over_predictions(name):
    own = {"distillation_weight": 0.4} if name == "scrub" else {}
    config = ObjectiveConfig(name=name, retain_weight=0.7, forget_weight=1.9, **own)
    objective, batch = build_objective(config, None), _batch()
    retain, forget = _scrub(batch, 0.4) if name == "scrub" else _random_labels(batch)
    value = float(objective(batch, TOTALS))
    assert value == pytest.approx(0.7 * retain + 1.9 * forget, rel=1e-13)
    parts = [objective(_batch(rows), TOTALS) for rows in (range(3), range(3, 3), range(3, 8))]
    assert float(sum(parts)) == pytest.approx(value, rel=1e-13)
    terms = objective.terms(batch, TOTALS)
    assert float(terms["forget_term"]) == pytest.approx(forget, rel=1e-13)


@pytest.mark.parametrize("name", ["random_labels", "scrub"])
def test_one_role_alone(name):
    """As in SCRUB's turns: the other role's term is an exact zero and no number of its own."""
    objective, batch = build_objective(ObjectiveConfig(name=name), None), _batch(range(3))
    totals = dataclasses.replace(TOTALS, num_retain_records=0, num_retain_tokens=0, num_forget_tokens=3)
    terms = objective.terms(batch, totals)
    assert set(terms) == {"forget_loss_nats_per_token", "forget_term"}
    assert float(objective(batch, totals)) == pytest.approx(float(terms["forget_term"]), rel=1e-14)


def test_at_the_teacher_the_ascent_has_no_gradient():
    """Why a cycle begins with descents: Adam would make steps of full length out of rounding."""
    logits = torch.randn(5, NUM_LABELS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits.requires_grad_()
    unread = torch.full((5,), math.nan)
    known = Constants(unread, unread, unread)
    batch = Predictions(
        logits, torch.arange(5), torch.zeros(5, dtype=torch.int64), torch.tensor([True]), known, logits.detach()
    )
    value = build_objective(ObjectiveConfig(name="scrub"), None)(batch, MinibatchTotals(1, 0, 5, 0))
    (gradient,) = torch.autograd.grad(value, logits)
    assert float(value.detach()) == 0.0 and float(gradient.abs().max()) < 1e-16


def test_states_are_steered_and_kept():
    """RMU's terms, prediction by prediction; what the class is given as logits are hidden states."""
    config = ObjectiveConfig(name="rmu", retain_weight=0.7, forget_weight=1.9, steering_coefficient=2.5)
    objective, batch = build_objective(config, None, seed=4), _batch()
    u = control_vector(NUM_LABELS, 4).tolist()
    assert sum(x * x for x in u) == pytest.approx(1.0) and min(u) >= 0 and u != control_vector(NUM_LABELS, 5).tolist()
    forget = retain = 0.0
    for state, start, record in zip(batch.logits.tolist(), batch.start_logits.tolist(), batch.record, strict=True):
        if FORGET[int(record)]:
            squares = sum((h - 2.5 * x) ** 2 for h, x in zip(state, u, strict=True))
            forget += squares / NUM_LABELS / TOTALS.num_forget_tokens
        else:
            squares = sum((h - was) ** 2 for h, was in zip(state, start, strict=True))
            retain += squares / NUM_LABELS / TOTALS.num_retain_tokens
    assert float(objective(batch, TOTALS)) == pytest.approx(0.7 * retain + 1.9 * forget, rel=1e-13)
    parts = [objective(_batch(rows), TOTALS) for rows in (range(3), range(3, 3), range(3, 8))]
    assert float(sum(parts)) == pytest.approx(0.7 * retain + 1.9 * forget, rel=1e-13)
    terms = {name: float(value) for name, value in objective.terms(batch, TOTALS).items()}
    assert terms == pytest.approx({"forget_term": forget, "retain_term": retain}, rel=1e-13)


def test_labels_are_other_ones_and_all_of_them():
    labels = torch.tensor([0, 3, 6, 3])
    for u in np.linspace(0.0, 1.0 - 2**-53, 60):
        drawn = other_labels(labels, torch.full((4,), u, dtype=torch.float64), NUM_LABELS)
        assert not (drawn == labels).any() and int(drawn.min()) >= 0 and int(drawn.max()) < NUM_LABELS
    uniform = (torch.arange(6) + 0.5) / 6
    drawn = [int(other_labels(torch.tensor([3]), uniform[i : i + 1], NUM_LABELS)) for i in range(6)]
    assert drawn == [0, 1, 2, 4, 5, 6]
    largest = torch.tensor([1.0 - 2**-53], dtype=torch.float64)
    assert int(other_labels(torch.tensor([0]), largest, 2**24)) == 2**24 - 1


def test_numbers_depend_on_seed_record_and_place_alone():
    indices, counts = np.array([5, 2, 9]), np.array([2, 0, 3])
    whole = uniform_numbers(3, indices, counts)
    alone = [uniform_numbers(3, indices[i : i + 1], counts[i : i + 1]) for i in range(3)]
    assert np.array_equal(whole, np.concatenate(alone)) and len(set(whole)) == 5
    assert not np.isin(uniform_numbers(4, indices, counts), whole).any()
    many = uniform_numbers(0, np.arange(400), np.full(400, 50))
    assert abs(many.mean() - 0.5) < 0.01 and abs(many.var() - 1 / 12) < 0.002 and 0 <= many.min() < many.max() < 1
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.03
