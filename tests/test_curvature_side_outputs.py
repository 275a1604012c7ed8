"""Blocks with a second output: fine while nobody differentiates through it, refused in every mode when someone does."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distributed_unlearn.errors import ModelError
from tests.bench import Bench
from tests.families import random_batch

EXACT = 1e-12
MODES = ("recompute", "keep_forward", "cached")
PRODUCTS = ("hessian", "gauss_newton")
Pair = namedtuple("Pair", ["mask", "state"])


class SideOutputBlock(nn.Module):
    """Returns its hidden state and something made on the way; adds what it is given."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(8, 8), wrap

    def forward(self, hidden, extra=None):
        inner = torch.tanh(self.linear(hidden))
        while isinstance(extra, (tuple, list)):
            extra = extra[-1]
        if isinstance(extra, dict):
            extra = extra["state"]
        return hidden + (inner if extra is None else inner * extra), self.wrap(inner)


def ignored(model, first, blocks):
    hidden, _ = blocks[0](first)
    return blocks[1](hidden)[0]


def given_to_the_next_block(model, first, blocks):
    hidden, extra = blocks[0](first)
    return blocks[1](hidden, extra=extra)[0]


def used_between_blocks(model, first, blocks):
    hidden, extra = blocks[0](first)
    return blocks[1](hidden * model.norm.weight + extra)[0]


def used_by_the_head(model, first, blocks):
    hidden, extra = blocks[0](first)
    return blocks[1](hidden)[0] + extra


def used_as_the_hidden_state(model, first, blocks):
    _, extra = blocks[0](first)
    return blocks[1](extra)[0]


def weight_used_by_the_root(model, first, blocks):
    return ignored(model, first, blocks) @ blocks[0].linear.weight


class SideOutputModel(nn.Module):
    _no_split_modules = ["SideOutputBlock"]

    def __init__(self, use, wrap):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11)
        self.layers = nn.ModuleList([SideOutputBlock(wrap), SideOutputBlock(wrap)])
        self.use = use

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.use(self, self.embed(input_ids), self.layers)
        return SimpleNamespace(logits=self.head(self.norm(hidden)))


def make_bench(use, wrap=torch.sin):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SideOutputModel(use, wrap).double().eval()
    bench = Bench(model, random_batch(11, 2, 6, seed=1))
    assert bench.segmented.fallback_reason is None and len(bench.segmented.blocks) == 2
    return bench


CALLS = {
    "gradient": lambda bench, linearisation: linearisation.gradient(bench.zeros()),
    "product": lambda bench, linearisation: linearisation.product(bench.vector(bench.tangent(2)), bench.zeros()),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    "use", [given_to_the_next_block, used_between_blocks, used_by_the_head, used_as_the_hidden_state]
)
def test_a_second_output_that_someone_uses_is_refused(use, product, mode, call):
    bench = make_bench(use)
    with pytest.raises(ModelError, match="one hidden state"):
        CALLS[call](bench, bench.linearise(product, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x.sum(), x), lambda x: [(x,)], lambda x: {"state": x}, lambda x: Pair(None, x)],
    ids=["tuple", "list", "dict", "named tuple"],
)
def test_wherever_it_is_hidden(wrap, mode):
    bench = make_bench(given_to_the_next_block, wrap)
    with pytest.raises(ModelError, match="one hidden state"):
        bench.linearise(mode=mode).gradient(bench.zeros())


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_of_a_block_that_the_root_uses_is_refused(mode):
    bench = make_bench(weight_used_by_the_root)
    with pytest.raises(ModelError, match="one hidden state"):
        bench.linearise(mode=mode).gradient(bench.zeros())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("use", "wrap"),
    [(ignored, torch.sin), (given_to_the_next_block, lambda x: (x > 0).sum(-1, keepdim=True))],
    ids=["unused", "integers"],
)
def test_a_second_output_without_a_gradient_is_exact(use, wrap, product, mode):
    bench = make_bench(use, wrap)
    tangent = bench.tangent(2)
    truth = bench.truth(tangent, product)
    gradient, result = bench.zeros(), bench.zeros()
    linearisation = bench.linearise(product, mode)
    loss = linearisation.product(bench.vector(tangent), result, gradient)
    for found, expected in ((gradient, truth.gradient), (result, truth.hvp)):
        expected = bench.flatten(expected)
        assert float((found - expected).norm()) < EXACT * float(expected.norm())
    assert float(loss) == pytest.approx(float(truth.loss), rel=EXACT)
    assert float(linearisation.loss()) == pytest.approx(float(truth.loss), rel=EXACT)


@pytest.mark.parametrize("use", [given_to_the_next_block, used_by_the_head])
def test_a_loss_needs_no_gradient_and_is_not_refused(use):
    bench = make_bench(use)
    truth = bench.loss_of_logits(bench.logits(bench.model)).detach()
    assert float(bench.linearise().loss()) == pytest.approx(float(truth), rel=EXACT)
