"""Segment-wise loss, gradient and products against plain reverse over reverse on the whole model, in float64.

Both sides compute the same function with other graphs, so they differ by rounding alone: a chain of a few
thousand float64 operations, 1e-16 each, gives about 1e-14; EXACT leaves two orders of magnitude.
"""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distributed_unlearn.curvature.precision import LiftFloat32Casts
from distributed_unlearn.errors import ModelError
from tests.bench import Bench, ModelWeights
from tests.families import FAMILIES, VOCABULARY, RandomBatch, random_batch, tiny_model

EXACT = 1e-12
MODES = ("recompute", "keep_forward", "cached")
PRODUCTS = ("hessian", "gauss_newton")


@pytest.fixture(autouse=True)
def float64_everywhere():
    with LiftFloat32Casts():
        yield


@pytest.fixture
def batch():
    return random_batch(VOCABULARY, 3, 9, seed=1)


def relative_error(value, truth):
    return float((value - truth).norm() / truth.norm())


def assert_is_truth(bench, product, mode):
    tangent = bench.tangent(2)
    truth = bench.truth(tangent, product)
    gradient, result = bench.zeros(), bench.zeros()
    linearisation = bench.linearise(product, mode)
    both = linearisation.product(bench.vector(tangent), result, gradient)
    assert abs(float(both - truth.loss)) < EXACT * abs(float(truth.loss))
    assert relative_error(gradient, bench.flatten(truth.gradient)) < EXACT
    assert relative_error(result, bench.flatten(truth.hvp)) < EXACT


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
@pytest.mark.parametrize("product", PRODUCTS)
def test_an_empty_micro_batch_adds_nothing(product, mode, batch):
    *_, empty = uneven_parts(batch)
    bench = Bench(tiny_model("gemma", dtype=torch.float64), empty, share=1)
    gradient, result = bench.zeros(), bench.zeros()
    loss = bench.linearise(product, mode).product(bench.vector(bench.tangent(5)), result, gradient)
    assert float(loss) == 0 and not gradient.any() and not result.any()


def uneven_parts(batch):
    """One record; the others, narrower where they are padded; none at all. Their losses add up to the batch's."""
    width = int(batch.attention_mask[1:].sum(1).max())
    attends_first = torch.zeros(1, 8, dtype=torch.long)
    attends_first[0, 0] = 1
    empty = RandomBatch(torch.zeros(1, 8, dtype=torch.long), attends_first, torch.zeros(1, 8, dtype=torch.bool))
    parts = [RandomBatch(*(x[:1] for x in batch)), RandomBatch(*(x[1:, :width] for x in batch)), empty]
    assert len({part.input_ids.shape for part in parts}) == 3
    return parts


def shares_of(bench, parts):
    return [Bench(bench.model, part, share=bench.num_tokens).share() for part in parts]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_go_through_together(family, product, mode, batch):
    """Uneven ones, in one pass: the truth of the whole batch, and what their own passes add up to."""
    bench = Bench(tiny_model(family, dtype=torch.float64), batch)
    tangent = bench.tangent(2)
    truth, shares = bench.truth(tangent, product), shares_of(bench, uneven_parts(batch))
    together = bench.linearise(product, mode, shares)
    gradient, result, again = (bench.zeros() for _ in range(3))
    both = together.product(bench.vector(tangent), result, gradient)
    together.product(bench.vector(tangent), again)
    for loss in (both, together.loss()):
        assert loss.dtype == torch.float64 and abs(float(loss - truth.loss)) < EXACT * abs(float(truth.loss))
    assert relative_error(gradient, bench.flatten(truth.gradient)) < EXACT
    assert relative_error(result, bench.flatten(truth.hvp)) < EXACT
    assert torch.equal(result, again)
    own = bench.zeros()
    for share in shares:
        bench.linearise(product, mode, [share]).product(bench.vector(tangent), own)
    assert relative_error(result, own) < EXACT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [True, False])
def test_micro_batches_are_added_in_their_order(tied, mode, batch):
    """In float32, bit for bit as passes of their own where every result is added once a micro-batch.

    A tied embedding is not: its rows get the heads' results of all micro-batches first, then the inputs'.
    """
    bench = Bench(tiny_model("llama", tied), batch)
    vector, shares = bench.vector(bench.tangent(2)), shares_of(bench, uneven_parts(batch))
    (gradient, result), (own_gradient, own_result) = ((bench.zeros(), bench.zeros()) for _ in range(2))
    bench.linearise(mode=mode, shares=shares).product(vector, result, gradient)
    for share in shares:
        bench.linearise(mode=mode, shares=[share]).product(vector, own_result, own_gradient)
    for found, expected in ((gradient, own_gradient), (result, own_result)):
        different = {n for n, value in bench.named(found).items() if not torch.equal(value, bench.named(expected)[n])}
        assert different <= ({"model.embed_tokens.weight"} if tied else set())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ["loss", "gradient", "product"])
def test_a_pass_gathers_as_often_for_many_micro_batches_as_for_one(call, mode, batch):
    counts = []
    for parts in ([batch], uneven_parts(batch)):
        bench = WatchedStore(tiny_model("llama", dtype=torch.float64), batch)
        linearisation = bench.linearise(mode=mode, shares=shares_of(bench, parts))
        vector, result = bench.vector(bench.tangent(2)), bench.zeros()
        arguments = {"loss": (), "gradient": (result,), "product": (vector, result)}[call]
        getattr(linearisation, call)(*arguments)
        counts.append((bench.weights.num_gathers, bench.store.collectives.num_gathers))
    assert counts[0] == counts[1] and counts[0][0] >= 3  # root and two blocks


class WatchedStore(Bench):
    """Counts how often a segment's weights are asked for."""

    def __init__(self, model, batch):
        super().__init__(model, batch)
        self.weights = CountedWeights(model)
        self.store = dataclasses.replace(self.store, source=self.weights)


class CountedWeights(ModelWeights):
    num_gathers = 0

    def segment_weights(self, segment):
        self.num_gathers += 1
        return super().segment_weights(segment)


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
    bench = Bench(_other_family("biogpt", intermediate_size=48), batch)
    assert bench.segmented.fallback_reason is not None and bench.segmented.blocks == ()
    assert_is_truth(bench, product, mode)


def _other_family(family, **settings):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **sizes, **settings, initializer_range=0.15, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.double().eval()


@pytest.mark.parametrize("mode", ["recompute", "cached"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_blocks_with_tuple_outputs(product, mode, batch):
    model, outputs = _other_family("gptj", rotary_dim=4), []
    handle = model.transformer.h[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    bench = Bench(model, batch)
    bench.logits(model)
    handle.remove()
    assert isinstance(outputs[0], tuple) and len(bench.segmented.blocks) == 2
    assert_is_truth(bench, product, mode)


class Cube(torch.autograd.Function):
    """Twice differentiable in reverse mode, without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


class CubeModule(torch.nn.Module):
    def forward(self, x):
        return Cube.apply(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_block_without_a_forward_mode_rule_is_pushed_in_reverse_mode(product, mode, batch):
    """The second of two blocks; the first keeps its rule."""
    model = tiny_model("llama", dtype=torch.float64)
    model.model.layers[1].mlp.act_fn = CubeModule()
    bench = Bench(model, batch)
    assert_is_truth(bench, product, mode)
    linearisation = bench.linearise(product, mode)
    linearisation.product(bench.vector(bench.tangent(2)), bench.zeros())
    assert linearisation.reverse_only == (frozenset() if mode == "cached" else {1})


@pytest.mark.parametrize("product", PRODUCTS)
def test_bloom_has_an_activation_without_a_forward_mode_rule(product, batch):
    bench = Bench(_other_family("bloom", n_layer=2, n_head=4), batch)
    assert len(bench.segmented.blocks) == 2
    assert_is_truth(bench, product, "recompute")


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
