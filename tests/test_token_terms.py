"""Terms over tokens against loops and dense derivatives, and constants against hand-worked ranks."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacrev

from distributed_unlearn.config import ObjectiveConfig
from distributed_unlearn.curvature.head import rows_before_head
from distributed_unlearn.curvature.precision import LiftFloat32Casts
from distributed_unlearn.data.encoding import TokenBatch
from distributed_unlearn.engine.inputs import Minibatch, local_micro_batches
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.objectives.constants import LastSeen, RoundConstants, matched_targets
from distributed_unlearn.objectives.predictions import (
    LOG_ODDS_LIMIT,
    Constants,
    LabelledLogits,
    MinibatchTotals,
    Predictions,
    log_odds,
)
from distributed_unlearn.objectives.terms import Needs
from tests.bench import Bench
from tests.classifiers import FORGET, NUM_RECORDS, RETAIN, corpus_for, tiny_classifier
from tests.families import VOCABULARY, random_batch, tiny_model

TOTALS = MinibatchTotals(num_forget_records=2, num_retain_records=2, num_forget_tokens=5, num_retain_tokens=4)
WEIGHTS = {"retain_weight": 0.7, "forget_weight": 1.9}
CONFIGS = {
    "token_matched": ObjectiveConfig(name="token_matched", **WEIGHTS),
    "token and loss": ObjectiveConfig(name="token_matched", retain="loss", huber_delta=0.5, **WEIGHTS),
    "token and kl": ObjectiveConfig(name="token_matched", retain="kl", alternatives_weight=0.6, **WEIGHTS),
    "undial": ObjectiveConfig(name="undial", undial_strength=3.0, **WEIGHTS),
    "delete": ObjectiveConfig(name="delete", retain="kl", **WEIGHTS),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
RECORD = [0, 0, 1, 1, 1, 2, 2, 3, 3]  # 0 and 1 are forgotten, 4 is padding
NUM_CLASSES = 6


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    logits, start = (3 * torch.randn(9, NUM_CLASSES, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, NUM_CLASSES, (9,), generator=generator)
    odds, target = (2 * torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.to(dtype), labels, start, Constants(torch.full((9,), math.nan), odds, target)


def predictions_of(logits, rows=slice(None), records=slice(None)):
    _, labels, start, known = problem()
    record, forget = torch.tensor(RECORD), torch.tensor([True, True, False, False, True])
    first = int(record[rows][0]) if len(record[rows]) else 0
    constants = Constants(known.start_nll[rows], known.start_log_odds[rows], known.target_log_odds[rows])
    return Predictions(
        logits[rows], labels[rows], record[rows] - first, forget[records], constants, start[rows]
    )  # fmt: skip


def by_hand(config):
    """Every term as a loop over tokens, in Python floats."""
    logits, labels, start, known = problem()
    forget_sum = retain_sum = 0.0
    for n in range(9):
        y, record = int(labels[n]), RECORD[n]
        p, q = logits[n].softmax(0).tolist(), start[n].softmax(0).tolist()
        s = math.log(p[y]) - math.log(1 - p[y])
        others = [v for v in range(NUM_CLASSES) if v != y]
        c0 = [q[v] / (1 - q[y]) for v in others]
        if record < 2:
            x = s - float(known.target_log_odds[n])
            if config.name == "token_matched":
                delta = config.huber_delta
                forget_sum += 0.5 * x * x if abs(x) <= delta else delta * (abs(x) - delta / 2)
                c = [p[v] / (1 - p[y]) for v in others]
                forget_sum += config.alternatives_weight * sum(a * math.log(a / b) for a, b in zip(c0, c, strict=True))
            elif config.name == "undial":
                lowered = start[n].clone()
                lowered[y] -= config.undial_strength
                forget_sum -= sum(a * math.log(b) for a, b in zip(lowered.softmax(0).tolist(), p, strict=True))
            else:
                forget_sum += sum(a * math.log(a / p[v]) for a, v in zip(c0, others, strict=True))
        elif config.retain_term == "loss":
            retain_sum -= math.log(p[y])
        elif config.retain_term == "log_odds":
            retain_sum += (s - float(known.start_log_odds[n])) ** 2 / 2
        else:
            retain_sum += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return config.retain_weight * retain_sum / 4 + config.forget_weight * forget_sum / 5


@EACH
def test_value_is_the_loop_over_tokens(config):
    value = build_objective(config, None)(predictions_of(problem()[0]), TOTALS)
    assert value.shape == () and value.dtype == torch.float64
    assert float(value) == pytest.approx(by_hand(config), rel=1e-12)


@EACH
def test_parts_sum_to_the_whole_however_the_batch_is_cut(config):
    objective, logits = build_objective(config, None), problem()[0]
    whole = objective(predictions_of(logits), TOTALS)
    cuts = [
        (slice(0, 2), slice(0, 1)),
        (slice(2, 7), slice(1, 3)),
        (slice(7, 9), slice(3, 4)),
        (slice(9, 9), slice(4, 5)),
    ]
    parts = [predictions_of(logits, rows, records) for rows, records in cuts]
    torch.testing.assert_close(sum(objective(part, TOTALS) for part in parts), whole, rtol=1e-13, atol=0)
    names = [set(objective.terms(part, TOTALS)) for part in parts]
    assert all(found == names[0] for found in names)
    assert ("retain_term" in names[0]) == (config.retain_term != "loss")
    empty = logits.clone().requires_grad_()
    nothing = objective(predictions_of(empty, *cuts[3]), TOTALS)
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, empty)[0].any()


@EACH
def test_all_derivatives_exist(config):
    objective, logits = build_objective(config, None), problem()[0].requires_grad_()

    def value(x):
        return objective(predictions_of(x), TOTALS)

    assert gradcheck(value, logits, check_forward_ad=True)
    assert gradgradcheck(value, logits)
    tangent = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    (slope,) = torch.autograd.grad(value(logits), logits, create_graph=True)
    (product,) = torch.autograd.grad((slope * tangent).sum(), logits)
    with forward_ad.dual_level():
        (dual,) = torch.autograd.grad(value(forward_ad.make_dual(logits, tangent)), logits, create_graph=True)
        forward = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(forward, product, rtol=1e-12, atol=1e-13)


def test_what_they_read():
    found = {name: build_objective(config, None) for name, config in CONFIGS.items()}
    assert found["token_matched"].forget_needs == Needs(start=True, target=True)
    assert found["token_matched"].retain_needs == Needs(start=True)
    assert found["token and loss"].retain_needs == Needs()
    assert found["token and kl"].forget_needs == Needs(start=True, target=True, start_logits=True)
    assert found["undial"].forget_needs == found["delete"].retain_needs == Needs(start_logits=True)


def test_log_odds_do_not_saturate_where_the_probability_does():
    """In bfloat16 a probability above 0.998 is 1.0; its log-odds still say how far above, with a slope."""
    row = torch.tensor([[20.0, 0.0, 0.0], [60.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    assert (row.softmax(-1)[:, 0] == 1.0).all()
    seen = LabelledLogits(row, torch.tensor([0, 0]))
    torch.testing.assert_close(seen.log_odds, torch.tensor([20.0, 60.0]) - math.log(2), rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(seen.log_odds.sum(), row)
    assert slope[:, 0].tolist() == [1.0, 1.0]
    objective = build_objective(ObjectiveConfig(name="token_matched"), None)
    nothing = torch.full((2,), math.nan)
    target = Constants(nothing, nothing, torch.tensor([-1.0, -1.0]))
    certain = Predictions(row, torch.tensor([0, 0]), torch.tensor([0, 0]), torch.tensor([True]), target)
    value = objective(certain, MinibatchTotals(1, 0, 2, 0))
    (pull,) = torch.autograd.grad(value, row)
    assert value.isfinite() and pull[:, 0].tolist() == [0.5, 0.5]  # Huber's slope of 1, halved by the mean


def test_log_odds_are_clamped_only_without_an_alternative():
    rows = torch.tensor([[3.0, -math.inf, -math.inf], [-math.inf, 3.0, 1.0], [9e3, 0.0, 0.0]], requires_grad=True)
    found = log_odds(rows, torch.tensor([0, 0, 0]))
    assert found.tolist() == [LOG_ODDS_LIMIT, -LOG_ODDS_LIMIT, pytest.approx(9e3 - math.log(2))]
    (slope,) = torch.autograd.grad(found.sum(), rows)
    assert slope.isfinite().all() and not slope[:2].any() and slope[2, 0] == 1.0


@pytest.mark.parametrize(
    ("log_odds_now", "sample", "expected"),
    [
        ([5.0, 1.0, 3.0], [0.0], [0.0, 0.0, 0.0]),  # a holdout of one prediction
        ([5.0, 1.0, 3.0], [30.0, 10.0, 20.0], [30.0, 10.0, 20.0]),
        ([5.0, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0], [3.0, 1.0]),  # longer: its quantiles at 1/4 and 3/4
        ([4.0, 3.0, 2.0, 1.0], [7.0, 9.0], [9.0, 9.0, 7.0, 7.0]),  # shorter
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),  # ties in order of position
        ([], [1.0], []),
    ],
)
def test_targets_by_rank(log_odds_now, sample, expected):
    found = matched_targets(np.array(log_odds_now), np.array(sample))
    assert found.tolist() == expected


def test_constants_are_found_by_record():
    columns = [np.arange(6.0), np.arange(6.0) + 10, np.arange(6.0) + 20]
    known = RoundConstants(np.array([2, 5, 9]), np.array([1, 3, 2]), *columns, np.empty(0))
    nll, odds, target = known.rows(np.array([9, 4, 2]), np.array([2, 2, 1]))
    np.testing.assert_array_equal(nll, [4, 5, math.nan, math.nan, 0])
    np.testing.assert_array_equal(odds, nll + 10)
    np.testing.assert_array_equal(target, nll + 20)
    assert np.isnan(RoundConstants.none().rows(np.array([3]), np.array([2]))[0]).all()
    with pytest.raises(AssertionError, match="another corpus"):
        known.rows(np.array([5]), np.array([2]))


def test_refreshed_targets_follow_the_ranks_that_were_last_seen():
    """Record 5 is retained: it has constants but no targets. Record 7 has not even constants."""
    odds, nan = np.array([3.0, 1.0, 0.0, 2.0]), math.nan
    known = RoundConstants(
        np.array([2, 5, 9]),
        np.array([2, 1, 1]),
        odds,
        odds,
        np.array([30.0, 10.0, nan, 20.0]),
        np.array([10.0, 20, 30]),
    )
    seen = LastSeen(known)
    np.testing.assert_array_equal(seen.constants().target_log_odds, known.target_log_odds)
    seen.note(np.array([9, 7, 5]), np.array([1, 2, 1]), np.array([0.5, 8.0, 8.0, 8.0]))
    np.testing.assert_array_equal(seen.constants().target_log_odds, [30.0, 20.0, nan, 10.0])
    np.testing.assert_array_equal(seen.constants().start_log_odds, odds)
    assert seen.values.tolist() == [3.0, 1.0, 8.0, 0.5] and known.start_log_odds.tolist() == odds.tolist()


def test_classes_use_the_same_terms():
    """One label a record: ten images in micro-batches of four, one rank of two without any in its last."""
    corpus, model = corpus_for("cnn"), tiny_classifier("cnn")
    values = np.random.default_rng(0).standard_normal((2, NUM_RECORDS))
    indices = np.arange(NUM_RECORDS)
    known = RoundConstants(indices, np.ones_like(indices), values[0], values[0], values[1], np.empty(0))
    objective, minibatch = build_objective(ObjectiveConfig(name="token_matched"), None), Minibatch(FORGET, RETAIN)
    total = 0.0
    with torch.no_grad():
        for rank in range(2):
            micros = local_micro_batches(corpus, minibatch, objective, known, rank, 2, 4, torch.device("cpu"))
            for micro in micros:
                with rows_before_head(model, micro.batch.positions) as selection:
                    total += float(micro.loss(selection.rows(model(**micro.batch.inputs).logits)))
        logits = model(**corpus.batch(indices).inputs).logits.double()
    odds = [
        float(z[y] - torch.cat([z[:y], z[y + 1 :]]).logsumexp(0)) for z, y in zip(logits, corpus.classes, strict=True)
    ]
    distance = [abs(odds[i] - values[1, i]) for i in FORGET]
    forget = sum(0.5 * x * x if x <= 1 else x - 0.5 for x in distance) / len(FORGET)
    retain = sum((odds[i] - values[0, i]) ** 2 / 2 for i in RETAIN) / len(RETAIN)
    assert total == pytest.approx(forget + retain, rel=1e-5)


class TokenBench(Bench):
    """`token_matched` on one batch of a tiny model: the first record is forgotten."""

    def __init__(self, family):
        super().__init__(tiny_model(family, dtype=torch.float64), random_batch(VOCABULARY, 2, 6, seed=4))
        self.found = TokenBatch(*self.batch).predictions()
        count = len(self.found.labels)
        values = torch.randn(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.constants = Constants(torch.full((count,), math.nan), values[0] - 4, 2 * values[1] - 2)
        num_forget = int((self.found.record == 0).sum())
        self.totals = MinibatchTotals(1, 1, num_forget, count - num_forget)
        self.objective = build_objective(ObjectiveConfig(name="token_matched"), None)

    def loss_of_rows(self, rows):
        forget = torch.tensor([True, False])
        predictions = Predictions(rows, self.found.labels, self.found.record, forget, self.constants)
        return self.objective(predictions, self.totals)

    def loss_of_logits(self, logits):
        return self.loss_of_rows(logits.reshape(-1, logits.shape[-1])[self.found.positions])


@pytest.mark.parametrize("mode", ["recompute", "cached"])
def test_gauss_newton_of_token_matched_is_the_dense_one(mode):
    """`J' (d2L/dlogits2) J` with J and the Hessian of the loss by the logits as whole matrices."""
    bench = TokenBench("qwen2")
    name = "model.layers.1.mlp.down_proj.weight"  # of all others the direction is zero: J would be too large
    parameters = dict(bench.model.named_parameters())

    def rows(weight):
        output = functional_call(bench.model, {name: weight}, (), {**bench.batch.inputs, "use_cache": False})
        return output.logits.reshape(-1, VOCABULARY)[bench.found.positions]

    tangent = {n: torch.zeros_like(p) for n, p in parameters.items()}
    tangent[name] = bench.tangent(1)[name]
    with LiftFloat32Casts():
        jacobian = jacrev(rows)(parameters[name].detach()).reshape(-1, parameters[name].numel())
        logits = rows(parameters[name]).detach()
        curvature = hessian(bench.loss_of_rows)(logits).reshape(jacobian.shape[0], -1)
        product = bench.zeros()
        bench.linearise("gauss_newton", mode).product(bench.vector(tangent), product)
    found = bench.named(product)[name].reshape(-1)
    wanted = jacobian.T @ (curvature @ (jacobian @ tangent[name].reshape(-1)))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10 * float(wanted.detach().abs().max()))
