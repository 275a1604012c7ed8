"""The slow truths against dense matrices and against each other, and the precision mode they rest on."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional

from distributed_unlearn.curvature.precision import LiftFloat32Casts, exact_attention
from distributed_unlearn.curvature.reference import (
    central_difference,
    double_backward,
    frozen_rows,
    gauss_newton_product,
    zero_frozen_rows_,
)
from tests.answer_losses import token_nll
from tests.dense import FreeEntries, dense_gauss_newton, dense_hessian, forward_over_reverse
from tests.families import FAMILIES, VOCABULARY, random_batch, random_tangent, tiny_model

EXACT = 1e-12  # float64 over a few thousand operations


@pytest.fixture
def batch():
    return random_batch(VOCABULARY, 2, 9, seed=1)


def loss_of(batch):
    def loss(model):
        nll, num_tokens = token_nll(model(**batch.inputs).logits, batch.input_ids, batch.answer_mask)
        return nll.sum() / num_tokens.sum()

    return loss


def restrict(model, *suffixes):
    """Only these parameters stay variables, so that a dense matrix is small."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(suffixes))
    chosen = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(any(name.endswith(suffix) for name in chosen) for suffix in suffixes), chosen


def relative_error(value, truth):
    return float((value - truth).norm() / truth.norm())


def flat(vector):
    return torch.cat([value.reshape(-1) for value in vector.values()])


DENSE_CASES = [
    ("llama", True, ("embed_tokens.weight", "norm.weight")),
    ("llama", False, ("embed_tokens.weight", "layers.0.self_attn.k_proj.weight", "norm.weight")),
    ("gpt_neox", False, ("0.attention.query_key_value.bias", "0.input_layernorm.weight", "final_layer_norm.bias")),
]


@pytest.mark.parametrize(("family", "tied", "variables"), DENSE_CASES)
def test_double_backward_is_the_dense_hessian(family, tied, variables, batch):
    model = tiny_model(family, tied, torch.float64)
    restrict(model, *variables)
    tangent, loss = random_tangent(model, 2), loss_of(batch)
    entries = FreeEntries(model, list(tangent), frozen_rows(model))
    assert (batch.input_ids[:, 1] == 0).all()
    with LiftFloat32Casts():
        result = double_backward(model, loss, tangent)
        matrix = dense_hessian(entries, loss, vectorised=family != "gpt_neox")
    truth = matrix @ entries.flatten(tangent)
    assert relative_error(entries.flatten(result.hvp), truth) < EXACT
    assert matrix.norm() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_frozen_rows_are_zero_everywhere_and_the_row_would_matter(family, tied, batch):
    model = tiny_model(family, tied, torch.float64)
    rows = frozen_rows(model)
    assert rows == {"model.embed_tokens.weight": 0}
    tangent = random_tangent(model, 3)
    before = {name: value.clone() for name, value in tangent.items()}
    result = double_backward(model, loss_of(batch), tangent)
    for vector in (result.gradient, result.hvp):
        assert not vector["model.embed_tokens.weight"][0].any()
        assert vector["model.embed_tokens.weight"][1:].any()
    assert all(torch.equal(tangent[name], before[name]) for name in tangent)
    model.get_input_embeddings().padding_idx = None
    unfrozen = double_backward(model, loss_of(batch), tangent)
    assert unfrozen.gradient["model.embed_tokens.weight"][0].any()
    assert relative_error(flat(result.hvp), flat(unfrozen.hvp)) > 1e-3


def test_zero_frozen_rows_ignores_vectors_without_the_parameter():
    vector = {"a": torch.ones(3, 2)}
    assert zero_frozen_rows_(vector, {"a": 1, "b": 0}) is vector
    assert vector["a"].tolist() == [[1, 1], [0, 0], [1, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_double_backward_is_symmetric_and_linear(family, batch):
    model = tiny_model(family, dtype=torch.float64)
    u, v = random_tangent(model, 4), random_tangent(model, 5)
    rows, loss = frozen_rows(model), loss_of(batch)
    with LiftFloat32Casts():
        hu, hv = double_backward(model, loss, u).hvp, double_backward(model, loss, v).hvp
        mixed = double_backward(model, loss, {name: 2 * u[name] - v[name] for name in u}).hvp
    zero_frozen_rows_(u, rows), zero_frozen_rows_(v, rows)
    scale = float(flat(u).norm() * flat(hv).norm())
    assert abs(float(flat(u) @ flat(hv) - flat(v) @ flat(hu))) < EXACT * scale
    assert relative_error(flat(mixed), 2 * flat(hu) - flat(hv)) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_is_float64_only_inside_the_mode(family, batch):
    model = tiny_model(family, dtype=torch.float64)
    tangent, loss = random_tangent(model, 6), loss_of(batch)
    entries = FreeEntries(model, list(tangent), frozen_rows(model))
    stock = double_backward(model, loss, tangent)
    with LiftFloat32Casts():
        lifted = double_backward(model, loss, tangent)
        forward = forward_over_reverse(entries, loss, entries.flatten(tangent))
    assert relative_error(entries.flatten(lifted.hvp), forward) < EXACT
    assert 1e-9 < relative_error(flat(stock.hvp), flat(lifted.hvp)) < 1e-4
    assert lifted.loss.dtype == torch.float64


@pytest.mark.parametrize("tied", [True, False])
def test_forward_mode_over_the_frozen_row_is_another_operator(tied, batch):
    """The trap that `frozen_rows` is there for: without it the two modes disagree by far more than rounding."""
    model = tiny_model("llama", tied, torch.float64)
    tangent, loss = random_tangent(model, 7), loss_of(batch)
    everything = FreeEntries(model, list(tangent), {})
    with LiftFloat32Casts():
        reverse = double_backward(model, loss, tangent).hvp
        forward = forward_over_reverse(everything, loss, everything.flatten(tangent))
    assert relative_error(everything.flatten(reverse), forward) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_central_difference_agrees_and_knows_its_error(family, batch):
    model = tiny_model(family, dtype=torch.float64)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    tangent, loss = random_tangent(model, 8), loss_of(batch)
    with LiftFloat32Casts():
        truth = double_backward(model, loss, tangent)
        result = central_difference(model, loss, tangent, 1e-3)
        scaled = central_difference(model, loss, {name: 1e6 * value for name, value in tangent.items()}, 1e-3)
        coarse = central_difference(model, loss, tangent, 3e-2)
    assert relative_error(flat(result.hvp), flat(truth.hvp)) < 1e-8
    assert relative_error(flat(scaled.hvp), 1e6 * flat(truth.hvp)) < 1e-8
    for estimate in (result, coarse):
        error = relative_error(flat(estimate.hvp), flat(truth.hvp))
        assert error <= estimate.relative_error_estimate
    assert relative_error(flat(result.gradient), flat(truth.gradient)) < EXACT and torch.equal(result.loss, truth.loss)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_central_difference_restores_the_weights_when_the_loss_raises(batch):
    model = tiny_model("llama", dtype=torch.float64)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    calls = []

    def loss(module):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("third call")
        return loss_of(batch)(module)

    with pytest.raises(RuntimeError, match="third call"):
        central_difference(model, loss, random_tangent(model, 0), 1e-3)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize(("family", "tied", "variables"), DENSE_CASES)
def test_gauss_newton_is_the_dense_product(family, tied, variables, batch):
    model = tiny_model(family, tied, torch.float64)
    restrict(model, *variables)
    tangent = random_tangent(model, 9)
    entries = FreeEntries(model, list(tangent), frozen_rows(model))

    def logits_fn(module):
        return module(**batch.inputs).logits

    def loss_of_logits(logits):
        # Without token_nll, whose selection of positions is data dependent and so outside of vmap.
        labels = batch.input_ids[:, 1:].masked_fill(~batch.answer_mask[:, 1:], -100)
        return functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="sum") / labels.numel()

    with LiftFloat32Casts():
        result = gauss_newton_product(model, logits_fn, loss_of_logits, tangent)
        matrix = dense_gauss_newton(entries, logits_fn, loss_of_logits)
        hessian_result = double_backward(model, lambda module: loss_of_logits(logits_fn(module)), tangent)
    assert relative_error(entries.flatten(result.hvp), matrix @ entries.flatten(tangent)) < EXACT
    assert relative_error(flat(result.gradient), flat(hessian_result.gradient)) < EXACT
    assert relative_error(flat(result.hvp), flat(hessian_result.hvp)) > 1e-3
    for name, row in frozen_rows(model).items():
        if name in result.hvp:
            assert not result.hvp[name][row].any()


def test_a_loss_that_is_linear_in_the_variables_has_no_curvature():
    layer = torch.nn.Linear(3, 1, bias=False)
    result = double_backward(layer, lambda module: module(torch.ones(1, 3)).sum(), {"weight": torch.ones(1, 3)})
    assert result.gradient["weight"].tolist() == [[1, 1, 1]] and result.hvp["weight"].tolist() == [[0, 0, 0]]


def test_casts_in_the_mode():
    wide, narrow = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16)
    whole = torch.arange(2)
    with LiftFloat32Casts():
        lifted = [
            wide.float(), wide.to(torch.float32), wide.to(dtype=torch.float32), wide.to("cpu", torch.float32),
            wide.to(torch.ones(1)), wide.type(torch.float32), wide.softmax(0, dtype=torch.float32),
            torch.softmax(wide, 0, dtype=torch.float32), functional.softmax(wide, 0, dtype=torch.float32),
            functional.log_softmax(wide, dim=-1, dtype=torch.float32),
            wide.to(tensor=torch.ones(1)),
        ]  # fmt: skip
        kept = [
            narrow.float(), narrow.to(torch.float32), whole.float(), whole.bool().to(torch.float32),
            torch.ones(2).float(), functional.softmax(narrow, 0, dtype=torch.float32),
        ]  # fmt: skip
        others = wide.to(torch.bfloat16), wide.type(torch.int64), wide.to("cpu"), wide.type()
        mixed = wide.view(2, 1).float() @ whole.float().view(1, 2), torch.matmul(torch.ones(2, 2), wide)
        mean = (wide.float() * 2).to(wide.dtype)
    assert {value.dtype for value in lifted} == {torch.float64}
    assert {value.dtype for value in kept} == {torch.float32}
    assert [getattr(value, "dtype", value) for value in others] == [
        torch.bfloat16, torch.int64, torch.float64, "torch.DoubleTensor",
    ]  # fmt: skip
    assert {value.dtype for value in (*mixed, mean)} == {torch.float64}
    assert wide.float().dtype == torch.float32


def test_the_mode_changes_nothing_for_float32(batch):
    model = tiny_model("llama")
    outside = model(**batch.inputs).logits
    with LiftFloat32Casts():
        inside = model(**batch.inputs).logits
    assert torch.equal(outside, inside)


@pytest.mark.parametrize("context", [exact_attention, nullcontext])
def test_exact_attention_has_second_derivatives(context):
    query = torch.randn(1, 2, 4, 8, requires_grad=True)

    def twice():
        with context():
            value = functional.scaled_dot_product_attention(query, query, query, is_causal=True).square().sum()
        (slope,) = torch.autograd.grad(value, query, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), query)[0]

    if context is exact_attention:
        assert twice().abs().sum() > 0
    else:
        with pytest.raises(RuntimeError, match="not implemented|not support"):
            twice()
