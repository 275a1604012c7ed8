"""Objectives against loops over records, their derivatives, and their independence of how a batch is cut."""

import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from distributed_unlearn.config import ObjectiveConfig
from distributed_unlearn.errors import ConfigError, NumericalError
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.objectives.predictions import Constants, MinibatchTotals, Predictions
from distributed_unlearn.objectives.record_terms import NegativePreferenceTerm
from distributed_unlearn.objectives.terms import Needs
from tests.answer_losses import correct_tokens, token_nll

HOLDOUT = 1.3
WEIGHTS = {"retain_weight": 0.7, "forget_weight": 1.9}
CONFIGS = {
    "retain": ObjectiveConfig(name="retain", **WEIGHTS),
    "gradient_ascent": ObjectiveConfig(name="gradient_ascent", **WEIGHTS),
    "graddiff": ObjectiveConfig(name="graddiff", **WEIGHTS),
    "npo": ObjectiveConfig(name="npo", beta=0.4, **WEIGHTS),
    "simnpo": ObjectiveConfig(name="simnpo", beta=0.4, **WEIGHTS),
    "huber": ObjectiveConfig(name="holdout_matched", penalty="huber", huber_delta=0.5, **WEIGHTS),
    "squared": ObjectiveConfig(name="holdout_matched", penalty="squared", huber_delta=0.5, **WEIGHTS),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

# Records: forget below, inside and above the Huber zone; one padding row (no tokens, NaN reference) of each role.
NLL = [1.5, 5.2, 30.0, 4.0, 9.5, 2.25, 0.0, 0.0]
TOKENS = [5, 4, 6, 3, 7, 2, 0, 0]
FORGET = [True, True, True, False, False, False, True, False]
REFERENCE = [1.0, 6.0, 5.0, math.nan, math.nan, math.nan, math.nan, math.nan]
TOTALS = MinibatchTotals(num_forget_records=3, num_retain_records=3, num_forget_tokens=15, num_retain_tokens=12)


def predictions_of(nll, tokens, forget, reference):
    """Records whose nll is spread evenly over their tokens, of two classes with logits 0 and log(exp(nll) - 1)."""
    record = torch.arange(len(tokens)).repeat_interleave(tokens)
    each = nll[record] / tokens[record]
    other = each + torch.log(-torch.expm1(-each))
    logits, labels = torch.stack([torch.zeros_like(other), other], 1), torch.zeros(len(record), dtype=torch.int64)
    unread = torch.full_like(reference[record], math.nan)
    return Predictions(logits, labels, record, forget, Constants(reference[record] / tokens[record], unread, unread))


def batch_of(rows=slice(None), nll=None):
    nll = torch.tensor(NLL, dtype=torch.float64) if nll is None else nll
    tokens, forget, reference = torch.tensor(TOKENS), torch.tensor(FORGET), torch.tensor(REFERENCE).double()
    return predictions_of(nll[rows], tokens[rows], forget[rows], reference[rows])


def log_sigmoid(z):
    return -math.log1p(math.exp(-z))


def by_hand(config):
    """The definitions of DESIGN.md, record by record, in Python floats."""
    records = [(n, k, f, r) for n, k, f, r in zip(NLL, TOKENS, FORGET, REFERENCE, strict=True) if k > 0]
    forget = [(n, k, r) for n, k, is_forget, r in records if is_forget]
    retain_loss = sum(n for n, _, f, _ in records if not f) / sum(k for _, k, f, _ in records if not f)
    forget_loss = sum(n for n, _, _ in forget) / sum(k for _, k, _ in forget)
    retain, weight, beta, delta = (
        config.retain_weight * retain_loss,
        config.forget_weight,
        config.beta,
        config.huber_delta,
    )
    if config.name == "retain":
        return retain
    if config.name == "gradient_ascent":
        return -weight * forget_loss
    if config.name == "graddiff":
        return retain - weight * forget_loss
    per_record = []
    for n, k, r in forget:
        if config.name == "npo":
            log_p, log_p_reference = -n, -r
            per_record.append(-2 / beta * log_sigmoid(-beta * (log_p - log_p_reference)))
        elif config.name == "simnpo":
            per_record.append(-2 / beta * log_sigmoid(-beta / k * -n))
        else:
            x = n / k - HOLDOUT
            outside = config.penalty == "huber" and abs(x) > delta
            per_record.append(delta * (abs(x) - delta / 2) if outside else 0.5 * x * x)
    return retain + weight * sum(per_record) / len(per_record)


@EACH
def test_value_is_the_loop_over_records(config):
    value = build_objective(config, HOLDOUT)(batch_of(), TOTALS)
    assert value.shape == () and value.dtype == torch.float64
    assert float(value) == pytest.approx(by_hand(config), rel=1e-14)


@EACH
def test_parts_sum_to_the_whole_however_the_batch_is_cut(config):
    objective = build_objective(config, HOLDOUT)
    whole, whole_terms = objective(batch_of(), TOTALS), objective.terms(batch_of(), TOTALS)
    for cuts in ([slice(0, 4), slice(4, 8)], [slice(0, 1), slice(1, 7), slice(7, 8)], [slice(0, 0), slice(0, 8)]):
        parts = [batch_of(rows) for rows in cuts]
        total = sum(objective(part, TOTALS) for part in parts)
        torch.testing.assert_close(total, whole, rtol=1e-14, atol=0)
        terms = [objective.terms(part, TOTALS) for part in parts]
        for name, value in whole_terms.items():
            assert all(set(part) == set(whole_terms) for part in terms)
            torch.testing.assert_close(sum(part[name] for part in terms), value, rtol=1e-14, atol=0)


@EACH
def test_first_and_second_derivatives(config):
    objective = build_objective(config, HOLDOUT)
    nll = torch.tensor(NLL, dtype=torch.float64, requires_grad=True)

    def value(x):
        return objective(batch_of(nll=x), TOTALS)

    assert gradcheck(value, nll, check_forward_ad=True)
    assert gradgradcheck(value, nll)
    tangent = torch.linspace(-1, 1, len(NLL), dtype=torch.float64)
    (slope,) = torch.autograd.grad(value(nll), nll, create_graph=True)
    product = torch.zeros_like(nll)  # where the objective is linear, the slope has no graph to nll
    if config.name not in ("retain", "gradient_ascent", "graddiff"):
        (product,) = torch.autograd.grad(slope @ tangent, nll)
        assert product.any()
    with forward_ad.dual_level():
        (dual_slope,) = torch.autograd.grad(value(forward_ad.make_dual(nll, tangent)), nll, create_graph=True)
        forward = forward_ad.unpack_dual(dual_slope).tangent
    torch.testing.assert_close(torch.zeros_like(nll) if forward is None else forward, product, rtol=1e-13, atol=1e-16)


@EACH
@pytest.mark.parametrize("rows", [slice(0, 0), slice(6, 8)], ids=["no rows", "padding rows"])
def test_an_empty_batch_is_an_exact_zero_with_a_graph(config, rows):
    objective = build_objective(config, HOLDOUT)
    nll = torch.tensor(NLL, dtype=torch.float64, requires_grad=True)
    batch = batch_of(rows, nll)
    value = objective(batch, TOTALS)
    assert value.item() == 0.0
    (slope,) = torch.autograd.grad(value, nll, create_graph=True)
    assert not slope.any() and slope.isfinite().all()
    assert all(part.item() == 0.0 for part in objective.terms(batch, TOTALS).values())


@EACH
def test_a_role_that_the_minibatch_lacks_contributes_nothing(config):
    objective = build_objective(config, HOLDOUT)
    only_retain, only_forget = MinibatchTotals(0, 3, 0, 12), MinibatchTotals(3, 0, 15, 0)
    retain_part, forget_part = (
        objective(batch_of(slice(3, 6)), only_retain),
        objective(batch_of(slice(0, 3)), only_forget),
    )
    torch.testing.assert_close(retain_part + forget_part, objective(batch_of(), TOTALS), rtol=1e-14, atol=1e-15)
    nll = torch.tensor(NLL, dtype=torch.float64, requires_grad=True)
    nothing = objective(batch_of(slice(6, 8), nll), MinibatchTotals(0, 0, 0, 0))
    assert nothing.item() == 0.0 and not torch.autograd.grad(nothing, nll)[0].any()
    assert set(objective.terms(batch_of(slice(3, 6)), only_retain)) == {"retain_loss_nats_per_token"}
    assert "retain_loss_nats_per_token" not in objective.terms(batch_of(slice(0, 3)), only_forget)


@EACH
def test_rows_of_the_other_role_cannot_poison_a_gradient(config):
    objective = build_objective(config, HOLDOUT)
    retain_only = config.name == "retain"
    nll = torch.tensor(NLL, dtype=torch.float64)
    poisoned = 0 if retain_only else 6
    nll[poisoned] = math.nan  # a forget record that `retain` ignores; a padding row
    nll.requires_grad_()
    value = objective(batch_of(nll=nll), TOTALS)
    (slope,) = torch.autograd.grad(value, nll)
    slope[poisoned] = 0.0  # through its own logits a NaN may go back, but through nobody else's
    assert value.isfinite() and slope.isfinite().all()


def test_a_term_of_weight_zero_is_not_evaluated():
    """0 * NaN is NaN: a part that nobody asked for (and whose reference nobody computed) must stay away."""
    nll = torch.tensor(NLL, dtype=torch.float64)
    nll[3] = math.inf
    no_retain = build_objective(ObjectiveConfig(name="npo", retain_weight=0), None)
    assert no_retain(batch_of(nll=nll), TOTALS).isfinite() and no_retain.retain_needs is None
    unreferenced = predictions_of(torch.tensor(NLL[:6]), torch.tensor(TOKENS[:6]), torch.tensor(FORGET[:6]),
                                  torch.full((6,), math.nan))  # fmt: skip
    no_forget = build_objective(ObjectiveConfig(name="npo", forget_weight=0), None)
    assert no_forget(unreferenced, TOTALS).isfinite() and no_forget.forget_needs is None
    assert "forget_term" not in no_forget.terms(unreferenced, TOTALS)


def test_terms_by_hand():
    nll = torch.tensor(NLL, dtype=torch.float64, requires_grad=True)
    terms = build_objective(CONFIGS["huber"], HOLDOUT).terms(batch_of(nll=nll), TOTALS)
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {
            "retain_loss_nats_per_token": 15.75 / 12,
            "forget_loss_nats_per_token": 36.7 / 15,
            "forget_distance_nats": (1.0 + 0.0 + 3.7) / 3,
            # distances -1 and 3.7 are outside delta = 0.5: 0.5 (|x| - 0.25)
            "forget_term": (0.375 + 0.0 + 1.725) / 3,
        }
    )
    assert all(not value.requires_grad for value in terms.values())
    without_holdout = build_objective(CONFIGS["npo"], None).terms(batch_of(), TOTALS)
    assert set(without_holdout) == {"retain_loss_nats_per_token", "forget_loss_nats_per_token", "forget_term"}


def test_what_each_objective_asks_for():
    needs = {
        name: (o.forget_needs, o.retain_needs)
        for name, o in ((name, build_objective(config, HOLDOUT)) for name, config in CONFIGS.items())
    }
    nothing, mean = Needs(), Needs(holdout_loss=True)
    assert needs == {
        "retain": (None, nothing),
        "gradient_ascent": (nothing, None),
        "graddiff": (nothing, nothing),
        "npo": (Needs(start=True), nothing),
        "simnpo": (nothing, nothing),
        "huber": (mean, nothing),
        "squared": (mean, nothing),
    }


def test_refusals():
    with pytest.raises(ConfigError, match="without a holdout loss"):
        build_objective(CONFIGS["huber"], None)
    with pytest.raises(NumericalError, match="holdout loss of nan"):
        build_objective(CONFIGS["huber"], math.nan)
    for name in ("retain", "gradient_ascent", "npo"):
        with pytest.raises(ConfigError, match="every weight in use at 0"):
            build_objective(ObjectiveConfig(name=name, retain_weight=0, forget_weight=0), None)


@pytest.mark.parametrize("excess", [-2990.0, -900.0, 0.0, 900.0, 3000.0])
def test_npo_has_finite_second_derivatives_far_from_the_reference(excess):
    """A long answer that is 900 nats off overflows exp in float32; at 0, the first step, slopes are halves."""
    nll = torch.tensor([3000.0 + excess], requires_grad=True)
    batch = predictions_of(nll, torch.tensor([10]), torch.tensor([True]), torch.tensor([3000.0], dtype=torch.float64))
    value = NegativePreferenceTerm(0.1)(batch, MinibatchTotals(1, 0, 10, 0))
    (slope,) = torch.autograd.grad(value, nll, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), nll)
    sigmoid = torch.tensor(0.1 * excess, dtype=torch.float64).sigmoid()
    # d/dx of -(2/b) log sigmoid(b x) is -2 sigmoid(-b x); its derivative 2 b s (1 - s).
    torch.testing.assert_close(slope.double(), -2 * (1 - sigmoid).view(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(curvature.double(), (0.2 * sigmoid * (1 - sigmoid)).view(1), rtol=1e-5, atol=1e-6)
    assert value.dtype == torch.float32


def random_logits(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, 7, (3, 5), generator=generator)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 2:4] = True
    mask[1, 1:] = True
    mask[1, 0] = True  # nothing predicts the first token: ignored
    return logits, ids, mask


def test_token_losses_are_the_loop_over_positions():
    logits, ids, mask = random_logits()
    nll, num_tokens = token_nll(logits, ids, mask)
    correct = correct_tokens(logits, ids, mask)
    for b in range(3):
        positions = [t for t in range(1, 5) if mask[b, t]]
        probabilities = logits[b].softmax(-1)
        assert float(nll[b]) == pytest.approx(-sum(math.log(probabilities[t - 1, ids[b, t]]) for t in positions))
        assert int(num_tokens[b]) == len(positions)
        assert int(correct[b]) == sum(int(logits[b, t - 1].argmax() == ids[b, t]) for t in positions)
    assert num_tokens.tolist() == [2, 4, 0] and nll.dtype == torch.float64
    assert correct.dtype == num_tokens.dtype == torch.int64


def test_correct_tokens_counts_right_predictions():
    _, ids, mask = random_logits()
    perfect = torch.nn.functional.one_hot(ids.roll(-1, 1), 7).float()
    assert correct_tokens(perfect, ids, mask).tolist() == [2, 4, 0]
    assert correct_tokens(-perfect, ids, mask).tolist() == [0, 0, 0]


def test_token_losses_have_all_derivatives():
    logits, ids, mask = random_logits()
    logits.requires_grad_()
    assert gradcheck(lambda x: token_nll(x, ids, mask)[0], logits, check_forward_ad=True)
    assert gradgradcheck(lambda x: token_nll(x, ids, mask)[0], logits)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_token_losses_are_summed_in_float32(dtype, expected):
    logits, ids, mask = random_logits(dtype)
    nll = token_nll(logits, ids, mask)[0]
    assert nll.dtype == expected
    torch.testing.assert_close(nll.double(), token_nll(logits.double(), ids, mask)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [0, 2])
def test_token_losses_of_no_answer_are_zero_with_a_graph(rows):
    logits = torch.randn(rows, 4, 7, requires_grad=True)
    ids, mask = torch.zeros(rows, 4, dtype=torch.int64), torch.zeros(rows, 4, dtype=torch.bool)
    nll, num_tokens = token_nll(logits, ids, mask)
    assert nll.tolist() == num_tokens.tolist() == correct_tokens(logits, ids, mask).tolist() == [0] * rows
    (slope,) = torch.autograd.grad(nll.sum(), logits, create_graph=True)
    assert not slope.any()
