"""Several micro-batches in one pass: the same numbers, one gather a segment; blocks that only reverse mode can do."""

import dataclasses

import pytest
import torch

from distributed_unlearn.curvature.precision import LiftFloat32Casts
from tests.bench import EXACT, Bench, ModelWeights, assert_is_truth, relative_error
from tests.families import FAMILIES, VOCABULARY, RandomBatch, other_family, random_batch, tiny_model

MODES = ("recompute", "keep_forward", "cached")
PRODUCTS = ("hessian", "gauss_newton")


@pytest.fixture(autouse=True)
def float64_everywhere():
    with LiftFloat32Casts():
        yield


@pytest.fixture
def batch():
    return random_batch(VOCABULARY, 3, 9, seed=1)


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
    # Three that count: of two the order would not show.
    shares = shares_of(bench, [RandomBatch(*(x[row : row + 1] for x in batch)) for row in range(3)])
    vector = bench.vector(bench.tangent(2))
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
@pytest.mark.parametrize("product", PRODUCTS)
def test_an_empty_micro_batch_adds_nothing(product, mode, batch):
    *_, empty = uneven_parts(batch)
    bench = Bench(tiny_model("gemma", dtype=torch.float64), empty, share=1)
    gradient, result = bench.zeros(), bench.zeros()
    loss = bench.linearise(product, mode).product(bench.vector(bench.tangent(5)), result, gradient)
    assert float(loss) == 0 and not gradient.any() and not result.any()


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
    bench = Bench(other_family("bloom", n_layer=2, n_head=4), batch)
    assert len(bench.segmented.blocks) == 2
    assert_is_truth(bench, product, "recompute")
