"""A number does not depend on the number of ranks, the ZeRO stage, the micro-batch or the mode.

Each case is compared with one float64 truth: a plain module, the whole minibatch at once, double backward.
"""

import pytest
import torch

from distributed_unlearn.data.sampling import cut
from tests.engine.cases import Problem, minibatch_of
from tests.engine.compare import STEP, assert_derivatives, assert_step, case_results, close, gathered
from tests.engine.plans import CASES, LLAMA, UNEVEN

pytestmark = pytest.mark.slow


def truth_of(case, ranks, truths):
    return truths(case.problem, gathered(ranks, "vector"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_gradient_product_and_krylov_matrix(case, results, truths):
    ranks = case_results(results, case)
    assert_derivatives(ranks, truth_of(case, ranks, truths))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_whole_step(case, results, truths):
    ranks = case_results(results, case)
    truth = truth_of(case, ranks, truths)
    assert truth.record.accepted and truth.record.update_norm > 1e-3
    assert_step(ranks, truth)
    assert all(rank["mode"].cached == (case.mode == "cached") for rank in ranks)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_next_coefficient_is_no_rounding(case, results, truths):
    """M comes from a difference of losses of third order; float64 from the logits on leaves their rounding alone."""
    ranks = case_results(results, case)
    assert len({rank["coefficient"] for rank in ranks}) == 1
    close(ranks[0]["coefficient"], truth_of(case, ranks, truths).coefficient, STEP, "M after the step")


def test_the_cases_leave_ranks_without_records_and_shards_with_padding(results):
    assert {case.micro_batch_size for case in CASES if case.problem == LLAMA} == {1, 3, 8}
    for size in (UNEVEN.gradient_batch, UNEVEN.curvature_batch):
        minibatch = minibatch_of(UNEVEN, size)
        counts = [len(cut(minibatch.forget, rank, 4)) + len(cut(minibatch.retain, rank, 4)) for rank in range(4)]
        assert sum(counts) == size and counts.count(0) >= 1
    layout = case_results(results, next(case for case in CASES if case.world_size == 4))[0]["layout"]
    last = [slot.local_numel(3) for segment in layout.segments for slot in segment.trainable]
    whole = [slot.shard_numel for segment in layout.segments for slot in segment.trainable]
    assert 0 in last and any(0 < a < b for a, b in zip(last, whole, strict=True))


def test_random_vectors_do_not_depend_on_the_number_of_ranks(results):
    same = [case for case in CASES if case.problem.checkpoint == "odd_llama"]
    vectors = [gathered(case_results(results, case), "vector") for case in same]
    assert len({case.world_size for case in same}) == 3
    for vector in vectors[1:]:
        assert all(torch.equal(vector[name], vectors[0][name]) for name in vectors[0])
    flat = torch.cat([value.reshape(-1) for value in vectors[0].values()])
    assert abs(float(flat.mean())) < 0.1 and abs(float(flat.std()) - 1) < 0.1
    assert not vectors[0]["model.embed_tokens.weight"][0].any()  # the pad token's row


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("method", ["all_reduce_sum", "reduce_scatter"])
def test_a_dropped_reduction_is_noticed(method, stage, results, truths):
    ranks = [found[f"{method} {stage}"] for found in results.of(2, "broken")]
    truth = truths(Problem(), gathered(ranks, "vector"))
    with pytest.raises(AssertionError):
        assert_derivatives(ranks, truth)
