"""Steps that remember and steps with an explicit Hessian, on shards, against the same solver on one float64 vector."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed_unlearn.curvature.precision import LiftFloat32Casts
from distributed_unlearn.curvature.reference import frozen_rows
from distributed_unlearn.solvers.methods.curenewton import CureNewton
from distributed_unlearn.solvers.methods.scurenewton import SCureNewton
from tests.dense import FreeEntries
from tests.engine.cases import Problem, assemble, load_float64, loss_on
from tests.engine.compare import STEP, close, close_vectors
from tests.engine.solver_programs import EXPLICIT, NORMS, REMEMBERING
from tests.solvers.memory_oracle import MemoryOracle

pytestmark = pytest.mark.slow

everywhere = pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (1, 3), (2, 0), (2, 3), (4, 0), (4, 3)])
PROBLEM = Problem()


class Bound:
    """The objective of the ranks' round on a few parameters of one plain module, in float64."""

    def __init__(self, folder, corpus, chosen):
        model = load_float64(str(folder))
        names = [name for name, _ in model.named_parameters() if chosen is None or "norm" in name]
        self.entries = FreeEntries(model, names, frozen_rows(model))
        self.corpus, self.start = corpus, load_float64(str(folder))

    def on(self, size, retain_weight=1.0):
        def objective(w, step):
            loss = loss_on(self.corpus, PROBLEM, size, step, self.start, retain_weight)
            with LiftFloat32Casts():
                return self.entries.bind(loss)(w)

        return objective

    def oracle(self):
        return MemoryOracle(self.on(PROBLEM.gradient_batch), self.entries.point, self.on(PROBLEM.curvature_batch))


@pytest.fixture(scope="module")
def remembered(checkpoints, corpus):
    bound = Bound(checkpoints / "odd_llama", corpus, None)
    oracle = bound.oracle()
    oracle.plain.forget = bound.on(PROBLEM.gradient_batch, retain_weight=0.0)
    # The ranks count the frozen row too where they take a mean over all entries.
    oracle._space.num_entries = sum(value.numel() for value in bound.entries.base.values())
    solver = SCureNewton(oracle, REMEMBERING)
    records = [solver.step(step) for step in range(3)]
    return bound.entries, records, oracle.weights - bound.entries.point


@everywhere
def test_steps_that_remember_are_those_of_one_vector(world_size, stage, results, remembered, checkpoints):
    """Two parts of the gradient and the last two steps, in Adam's metric, with minibatches of their own."""
    ranks = results.of(world_size, f"remembering {stage}")
    entries, records, update = remembered
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "odd_llama", dtype=torch.float32)
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moved = {n: value - start[n] for n, value in assemble([r["weights"] for r in ranks], ranks[0]["layout"]).items()}
    close_vectors(entries.flatten(moved), update, 5 * STEP, "update of three steps")
    for rank in ranks:
        assert rank["resumed"], "a restored round must go on bit for bit"
        assert rank["kept"] == ["accepted step 0", "accepted step 1", "metric second moment"]
        for found, expected in zip(rank["records"], records, strict=True):
            assert found.accepted and found.num_products == expected.num_products
            for name in ("alpha", "gamma", "update_norm", "predicted_reduction", "largest_ritz_value"):
                close(getattr(found, name), getattr(expected, name), 20 * STEP, name)
    assert [record.num_products for record in records] == [2, 3, 4]


@everywhere
def test_an_explicit_hessian_is_that_of_one_vector(world_size, stage, results, checkpoints, corpus):
    ranks = results.of(world_size, f"explicit {stage}")
    bound = Bound(checkpoints / "odd_llama", corpus, NORMS)
    oracle = bound.oracle()
    expected = CureNewton(oracle, EXPLICIT).step(0)
    update = assemble([rank["update"] for rank in ranks], ranks[0]["layout"])
    close_vectors(bound.entries.flatten(update), oracle.weights - bound.entries.point, STEP, "update")
    for rank in ranks:
        assert rank["record"].num_products == expected.num_products == ranks[0]["layout"].num_trainable
        for name in ("alpha", "gamma", "predicted_reduction", "smallest_ritz_value", "largest_ritz_value"):
            close(getattr(rank["record"], name), getattr(expected, name), 20 * STEP, name)


@everywhere
def test_the_spectrum_is_that_of_the_dense_hessian(world_size, stage, results, checkpoints, corpus):
    """All eigenvalues from products on shards, and the moments of the quadrature, against a dense float64 Hessian."""
    ranks = results.of(world_size, f"explicit {stage}")
    bound = Bound(checkpoints / "odd_llama", corpus, NORMS)
    on_curvature = bound.on(PROBLEM.curvature_batch)
    dense = torch.autograd.functional.hessian(lambda w: on_curvature(w, 0), bound.entries.point)
    expected = torch.linalg.eigvalsh(dense)
    largest = float(expected.abs().max())
    for rank in ranks:
        exact, lanczos = rank["spectra"]
        found = torch.tensor(exact.eigenvalues)
        assert exact.num_products == len(expected) and found.shape == expected.shape
        assert float((found - expected).abs().max()) <= 20 * STEP * largest
        # A full Krylov space sees every eigenvalue, so the largest one is exact, and shares are a distribution.
        assert sum(lanczos.shares) == pytest.approx(1.0)
        assert max(map(abs, lanczos.eigenvalues)) == pytest.approx(largest, rel=1e-3)
        assert lanczos == ranks[0]["spectra"][1]
