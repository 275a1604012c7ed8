"""What a linearisation keeps alive between its calls, against every allocation that its calls make."""

import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distributed_unlearn.curvature.cached_size import measure_kept
from distributed_unlearn.curvature.store import SegmentSum
from distributed_unlearn.curvature.trace import LossShare
from tests.bench import Bench, ModelWeights, OneRank
from tests.families import FAMILIES, VOCABULARY, random_batch, tiny_model

PRODUCTS = ("hessian", "gauss_newton")


class Allocations(TorchDispatchMode):
    """Every storage that operators allocate inside the context, by weak reference."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage_of(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor)._cdata not in given:
                reference = StorageWeakRef(storage_of(tensor))
                self.made[reference] = storage_of(tensor).nbytes()
        return result

    def bytes_alive(self):
        return sum(size for reference, size in self.made.items() if not reference.expired())


def storage_of(tensor):
    return tensor.untyped_storage()


class CountingRank(OneRank):
    """Counts what is scattered, too."""

    def __init__(self):
        super().__init__()
        self.num_scattered = 0

    def reduce_scatter(self, full):
        self.num_scattered += full.numel()
        return super().reduce_scatter(full)


class GatheredWeights(ModelWeights):
    """New tensors at every call, as a gather of partitioned weights makes them."""

    on_gather = None

    def segment_weights(self, segment):
        if self.on_gather is not None:
            self.on_gather()
        return {name: weight.clone() for name, weight in super().segment_weights(segment).items()}


class WatchedBench(Bench):
    """A bench that knows which logits and losses are alive, what was scattered and what was gathered."""

    def __init__(self, family="llama", partitioned=True, change=lambda model: None):
        model = tiny_model(family, dtype=torch.float64)
        change(model)
        super().__init__(model, random_batch(VOCABULARY, 3, 9, seed=1))
        self.logits_seen, self.losses_seen = [], []
        self.source = GatheredWeights(model) if partitioned else ModelWeights(model)
        self.collectives = CountingRank()
        store = self.store
        self.store = type(store)(store.layout, self.collectives, self.source, store.compute_dtype)

    def loss_of_logits(self, logits):
        loss = super().loss_of_logits(logits)
        self.logits_seen.append(weakref.ref(logits))
        self.losses_seen.append(weakref.ref(loss))
        return loss

    def direction(self):
        return self.vector(self.tangent(2))


def num_alive(references):
    return sum(reference() is not None for reference in references)


def measure(bench, product="hessian"):
    return measure_kept(bench.segmented, bench.store, bench.share(), product)


def call(bench, linearisation, name):
    match name:
        case "gradient":
            linearisation.gradient(bench.zeros())
        case "product":
            linearisation.product(bench.direction(), bench.zeros())
        case "both":
            linearisation.product(bench.direction(), bench.zeros(), bench.zeros())
        case "loss":
            linearisation.loss()
        case "measure":
            measure(bench)


@pytest.mark.parametrize("mode", ["recompute", "keep_forward"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", ["gradient", "product", "both", "loss", "measure"])
def test_nothing_is_kept_but_in_cached_mode(name, product, mode):
    bench = WatchedBench()
    linearisation, allocations = bench.linearise(product, mode), Allocations()
    with allocations:
        call(bench, linearisation, name)
    assert len(bench.logits_seen) > 0 and sum(allocations.made.values()) > 0
    assert num_alive(bench.logits_seen) == num_alive(bench.losses_seen) == 0
    assert allocations.bytes_alive() == 0


@pytest.mark.parametrize("mode", ["recompute", "keep_forward", "cached"])
@pytest.mark.parametrize("name", ["gradient", "product"])
def test_nothing_is_kept_after_an_error(name, mode):
    bench = WatchedBench()

    def broken(logits):
        bench.loss_of_logits(logits)
        raise RuntimeError("no loss")

    linearisation = bench.linearise(mode=mode, shares=[LossShare(bench.batch.inputs, broken)])
    for attempt in (1, 2):  # a second call starts anew
        with pytest.raises(RuntimeError, match="no loss"):
            call(bench, linearisation, name)
        assert len(bench.logits_seen) == attempt
    assert num_alive(bench.logits_seen) == 0


def test_an_old_trace_is_gone_before_weights_are_gathered_for_a_new_one():
    bench, alive = WatchedBench(), []
    linearisation = bench.linearise(mode="cached")
    linearisation.gradient(bench.zeros())
    assert num_alive(bench.logits_seen) == 1
    bench.source.on_gather = lambda: alive.append(num_alive(bench.logits_seen[:1]))
    linearisation.gradient(bench.zeros())
    assert len(alive) == 3 and not any(alive)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_loss_keeps_what_is_cached(product):
    bench = WatchedBench()
    linearisation, before, after = bench.linearise(product, "cached"), bench.zeros(), bench.zeros()
    linearisation.product(bench.direction(), before)
    linearisation.loss()
    gathered = []
    bench.source.on_gather = lambda: gathered.append(1)
    linearisation.product(bench.direction(), after)
    assert torch.equal(before, after) and not gathered


@pytest.mark.parametrize("name", ["gradient", "product"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_cached_mode_keeps_no_gradient(product, name, monkeypatch):
    """Neither a block's nor the root's: only their graphs are needed once they are scattered."""
    bench, scattered = WatchedBench(), []
    add = SegmentSum.add

    def note(total, results):
        scattered.extend(StorageWeakRef(storage_of(t)) for t in results if t is not None)
        add(total, results)

    monkeypatch.setattr(SegmentSum, "add", note)
    linearisation = bench.linearise(product, "cached")
    call(bench, linearisation, name)
    assert len(scattered) > 10 and all(reference.expired() for reference in scattered)
    linearisation.product(bench.direction(), bench.zeros())  # keeps it alive until here


@pytest.mark.parametrize("name", ["gradient", "product", "both"])
def test_cached_gauss_newton_keeps_no_graph_of_the_loss(name):
    bench = WatchedBench()
    linearisation = bench.linearise("gauss_newton", "cached")
    call(bench, linearisation, name)
    assert len(bench.losses_seen) > 0 and num_alive(bench.losses_seen) == 0
    linearisation.product(bench.direction(), bench.zeros())  # keeps it alive until here


@pytest.mark.parametrize("mode", ["recompute", "cached"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_only_what_was_asked_for_is_scattered(product, mode):
    bench = WatchedBench()
    size, linearisation = bench.layout.vector_numel, bench.linearise(product, mode)
    linearisation.product(bench.direction(), bench.zeros())
    assert bench.collectives.num_scattered == size
    linearisation.product(bench.direction(), bench.zeros())
    assert bench.collectives.num_scattered == 2 * size
    bench.linearise(product, mode).product(bench.direction(), bench.zeros(), bench.zeros())
    assert bench.collectives.num_scattered == 4 * size


def assert_measured_is_kept(bench, product, num_shares=1):
    measured = measure(bench, product).cached(num_shares)
    linearisation, allocations = bench.linearise(product, "cached", [bench.share()] * num_shares), Allocations()
    with allocations:
        linearisation.gradient(bench.zeros())
    kept = allocations.bytes_alive()
    assert kept > 0
    assert abs(measured - kept) < 0.01 * kept, f"measured {measured}, kept {kept}, ratio {measured / kept:.3f}"
    with allocations:
        linearisation.product(bench.direction(), bench.zeros())
    assert allocations.bytes_alive() == kept
    return measured


@pytest.mark.parametrize("product", PRODUCTS)
def test_cached_mode_keeps_gathered_weights_once_for_all_micro_batches(product):
    """Root and blocks, whatever the number of micro-batches; replicated weights are the model's own."""
    sizes = {}
    for partitioned in (True, False):
        bench = WatchedBench("gemma", partitioned)
        sizes[partitioned] = [assert_measured_is_kept(bench, product, count) for count in (1, 2, 4)]
    weights = sum(storage_of(parameter).nbytes() for parameter in bench.model.parameters())
    assert [a - b for a, b in zip(sizes[True], sizes[False], strict=True)] == [weights] * 3


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_measured_cached_bytes(family, product):
    """The measurement builds the root's graphs and one block's; the truth is every storage left by a gradient.

    Blocks of one shape keep the same. Replicated weights are the model's own, so that only partitioned ones count.
    """
    bench = WatchedBench(family)
    partitioned = assert_measured_is_kept(bench, product)
    replicated = assert_measured_is_kept(WatchedBench(family, False), product)
    assert partitioned - replicated == sum(storage_of(parameter).nbytes() for parameter in bench.model.parameters())


@pytest.mark.parametrize("product", PRODUCTS)
def test_measured_cached_bytes_with_glue_between_the_blocks(product):
    bench = WatchedBench("gemma")
    norm = bench.model.model.norm
    for layer in bench.model.model.layers:
        layer.register_forward_hook(lambda module, args, output: output + torch.sin(output * norm.weight))
    assert_measured_is_kept(bench, product)


def test_measured_cached_bytes_of_one_segment():
    assert_measured_is_kept(WatchedBench(change=lambda model: setattr(model, "_no_split_modules", [])), "hessian")
