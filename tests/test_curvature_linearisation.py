"""Segment-wise loss, gradient and products against plain reverse over reverse on the whole model, in float64.

Both sides compute the same function with other graphs, so they differ by rounding alone: a chain of a few
thousand float64 operations, 1e-16 each, gives about 1e-14; EXACT leaves two orders of magnitude.
"""

import pytest
import torch

from distributed_unlearn.curvature.precision import LiftFloat32Casts
from distributed_unlearn.errors import ModelError
from tests.bench import EXACT, Bench, assert_is_truth, relative_error
from tests.families import FAMILIES, VOCABULARY, other_family, random_batch, tiny_model

MODES = ("recompute", "keep_forward", "cached")
PRODUCTS = ("hessian", "gauss_newton")


@pytest.fixture(autouse=True)
def float64_everywhere():
    with LiftFloat32Casts():
        yield


@pytest.fixture
def batch():
    return random_batch(VOCABULARY, 3, 9, seed=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradient_and_product(family, tied, product, mode, batch):
    bench = Bench(tiny_model(family, tied, torch.float64), batch)
    assert bench.segmented.fallback_reason is None and len(bench.segmented.blocks) == 2
    assert_is_truth(bench, product, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_and_loss_alone(family, mode, batch):
    bench = Bench(tiny_model(family, dtype=torch.float64), batch)
    truth = bench.truth(bench.tangent(2))
    gradient, linearisation = bench.zeros(), bench.linearise(mode=mode)
    from_gradient = linearisation.gradient(gradient)
    assert relative_error(gradient, bench.flatten(truth.gradient)) < EXACT
    alone = linearisation.loss()
    assert not alone.requires_grad and not from_gradient.requires_grad
    for loss in (from_gradient, alone):
        assert abs(float(loss - truth.loss)) < EXACT * abs(float(truth.loss))


@pytest.mark.parametrize("mode", ["recompute", "cached"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_after_a_gradient_a_loss_and_another_product(product, mode, batch):
    """What a step does: gradient, then products of several vectors, with a loss in between."""
    bench = Bench(tiny_model("llama", dtype=torch.float64), batch)
    linearisation = bench.linearise(product, mode)
    linearisation.gradient(bench.zeros())
    for seed in (3, 4):
        result, tangent = bench.zeros(), bench.tangent(seed)
        linearisation.product(bench.vector(tangent), result)
        linearisation.loss()
        assert relative_error(result, bench.flatten(bench.truth(tangent, product).hvp)) < EXACT


@pytest.mark.parametrize("mode", ["recompute", "cached"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_symmetric_linear_and_repeatable(family, product, mode, batch):
    bench = Bench(tiny_model(family, dtype=torch.float64), batch)
    u, v = bench.vector(bench.tangent(3)), bench.vector(bench.tangent(4))
    linearisation = bench.linearise(product, mode)

    def times(vector):
        result = bench.zeros()
        linearisation.product(vector, result)
        return result

    hu, hv = times(u), times(v)
    free = bench.flatten(bench.named(u)), bench.flatten(bench.named(v))  # `pack` zeroes frozen rows
    assert abs(float(free[0] @ hv - free[1] @ hu)) < EXACT * float(u.norm() * hv.norm())
    assert relative_error(times(2 * u - v), 2 * hu - hv) < EXACT
    assert torch.equal(times(v), hv)
    if product == "gauss_newton":
        assert float(free[1] @ hv) > 0  # this loss is convex in the logits


@pytest.mark.parametrize("mode", ["recompute", "cached"])
def test_results_are_added(mode, batch):
    bench = Bench(tiny_model("llama", dtype=torch.float64), batch)
    vector, plain, gradient = bench.vector(bench.tangent(2)), bench.zeros(), bench.zeros()
    bench.linearise(mode=mode).product(vector, plain, gradient)
    onto, gradient_onto = torch.ones_like(plain), torch.ones_like(plain)
    bench.linearise(mode=mode).product(vector, onto, gradient_onto)
    assert relative_error(onto, plain + 1) < EXACT
    assert relative_error(gradient_onto, gradient + 1) < EXACT


@pytest.mark.parametrize("mode", ["recompute", "cached"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_padding_rows_are_frozen_although_the_token_occurs(family, tied, mode, batch):
    bench = Bench(tiny_model(family, tied, torch.float64), batch)
    assert (batch.input_ids[:, 1] == 0).all() and batch.attention_mask[:, 1].all()
    tangent = bench.tangent(6)
    moved = {name: value.clone() for name, value in tangent.items()}
    moved["model.embed_tokens.weight"][0] += 100
    gradient, first, second = bench.zeros(), bench.zeros(), bench.zeros()
    bench.linearise(mode=mode).product(bench.vector(tangent), first, gradient)
    bench.linearise(mode=mode).product(bench.vector(moved), second)
    for vector in (gradient, first):
        embedding = bench.named(vector)["model.embed_tokens.weight"]
        assert not embedding[0].any() and embedding[1:].any()
    assert torch.equal(first, second)


def _unlisted(model):
    model._no_split_modules = []


def _blocks_share(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def _root_shares(model):
    model.model.norm = model.model.layers[1].input_layernorm


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_unlisted, "named by _no_split_modules"),
        (_blocks_share, "share parameters"),
        (_root_shares, "with the rest of the model"),
    ],
)
def test_a_model_without_separate_blocks_is_one_segment(change, reason, product, mode, batch):
    model = tiny_model("llama", dtype=torch.float64)
    change(model)
    bench = Bench(model, batch)
    assert reason in bench.segmented.fallback_reason and len(bench.segmented.segments) == 1
    assert_is_truth(bench, product, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_an_architecture_without_blocks_is_one_segment(product, mode, batch):
    bench = Bench(other_family("biogpt", intermediate_size=48), batch)
    assert bench.segmented.fallback_reason is not None and bench.segmented.blocks == ()
    assert_is_truth(bench, product, mode)


@pytest.mark.parametrize("mode", ["recompute", "cached"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_blocks_with_tuple_outputs(product, mode, batch):
    model, outputs = other_family("gptj", rotary_dim=4), []
    handle = model.transformer.h[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    bench = Bench(model, batch)
    bench.logits(model)
    handle.remove()
    assert isinstance(outputs[0], tuple) and len(bench.segmented.blocks) == 2
    assert_is_truth(bench, product, mode)


class SquashedEmbedding(torch.nn.Embedding):
    """Nonlinear in its weight, as an embedding with a norm behind it is."""

    def forward(self, input_ids):
        return torch.tanh(3 * super().forward(input_ids))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("tied", [True, False])
def test_nonlinear_glue_before_and_between_blocks(tied, product, mode, batch):
    """What is between blocks belongs to the root, here with a weight that the head uses as well."""
    model = tiny_model("llama", tied, torch.float64)
    inner = model.model
    inner.embed_tokens.__class__ = SquashedEmbedding

    def glue(module, args, output):
        return output + torch.sin(output * inner.norm.weight) + 0.3 * torch.roll(output, 1, dims=1) ** 2

    inner.layers[0].register_forward_hook(glue)
    inner.layers[1].register_forward_hook(glue)
    assert_is_truth(Bench(model, batch), product, mode)


PATTERNS = [
    ("*.mlp.*", "*norm.weight"),
    ("*layers.0.*",),
    ("*layers.1.self_attn.q_proj.weight",),
    ("*embed_tokens.weight",),
    ("model.norm.weight",),
]


@pytest.mark.parametrize("mode", ["recompute", "cached"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("patterns", PATTERNS)
def test_a_subset_of_the_parameters(patterns, product, mode, batch):
    bench = Bench(tiny_model("gemma", True, torch.float64), batch, patterns)
    assert 0 < len(bench.names) < len(list(bench.model.parameters()))
    assert bench.layout.frozen_numel + bench.layout.vector_numel == sum(p.numel() for p in bench.model.parameters())
    assert_is_truth(bench, product, mode)


def test_the_modes_gather_as_often_as_they_say(batch):
    """Cached: tangents only, one per segment and sweep, whatever came before."""
    bench = Bench(tiny_model("llama", dtype=torch.float64), batch)
    collectives, vector = bench.store.collectives, bench.vector(bench.tangent(2))
    linearisation = bench.linearise(mode="cached")
    linearisation.gradient(bench.zeros())
    before = collectives.num_gathers
    linearisation.product(vector, bench.zeros())
    assert collectives.num_gathers - before == 1 + 2 + 2  # root once, each block in both sweeps


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_second_gradient_in_cached_mode_is_refused(product, batch):
    bench = Bench(tiny_model("llama", dtype=torch.float64), batch)
    linearisation = bench.linearise(product, "cached")
    vector = bench.vector(bench.tangent(2))
    linearisation.product(vector, bench.zeros(), bench.zeros())
    with pytest.raises(AssertionError, match="once"):
        linearisation.product(vector, bench.zeros(), bench.zeros())


def test_blocks_called_in_another_order_are_refused(batch):
    bench = Bench(tiny_model("llama", dtype=torch.float64), batch)
    layers = bench.model.model.layers
    bench.model.model.layers = torch.nn.ModuleList([layers[1], layers[0]])
    with pytest.raises(ModelError, match="another order"):
        bench.linearise().loss()


def test_the_model_is_left_as_it_was(batch):
    bench = Bench(tiny_model("llama", dtype=torch.float64), batch)
    weights = [parameter.detach().clone() for parameter in bench.model.parameters()]
    logits = bench.logits(bench.model).detach()
    for mode in MODES:
        bench.product(2, mode=mode)
    assert all(torch.equal(a, b) for a, b in zip(weights, bench.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in bench.model.parameters())
    assert not any("forward" in block.__dict__ for block in bench.segmented.blocks)
    assert torch.equal(bench.logits(bench.model), logits)
