"""What passes keep, from what one micro-batch keeps and a budget: cost alone, never a result."""

import pytest

from distributed_unlearn.curvature.cached_size import KeptBytes
from distributed_unlearn.engine.memory_plan import plan_memory

KEPT = KeptBytes(weights=100, graphs=50, forward_graphs=20, inputs=4)


@pytest.mark.parametrize(
    ("budget", "cached", "keep_forward", "gradient_group", "product_group"),
    [
        (1000, True, True, 6, 2),
        (200, True, True, 5, 2),  # 100 + 2 * 50 in a product; (200 - 100) / 20 graphs in each of two gradient passes
        (199, False, True, 4, 2),
        (160, False, True, 3, 2),
        (159, False, False, 6, 2),  # two graphs at a time would take three passes: recomputing gathers less
        (12, False, False, 3, 2),
        (7, False, False, 1, 1),
        (0, False, False, 1, 1),
    ],
)
def test_auto_keeps_what_fits(budget, cached, keep_forward, gradient_group, product_group):
    plan = plan_memory(KEPT, budget, "auto", num_gradient=6, num_product=2)
    assert (plan.cached, plan.keep_forward) == (cached, keep_forward)
    assert (plan.gradient_group, plan.product_group) == (gradient_group, product_group)
    assert plan.cached_bytes == 200


def test_the_mode_that_was_asked_for_is_taken():
    recompute = plan_memory(KEPT, 1e9, "recompute", 6, 2)
    assert (recompute.cached, recompute.keep_forward, recompute.gradient_group) == (False, False, 6)
    cached = plan_memory(KEPT, 0, "cached", 6, 2)
    assert (cached.cached, cached.product_group) == (True, 2)
    # What products keep has room for two forward graphs, and three passes gather more than two.
    assert (cached.keep_forward, cached.gradient_group) == (False, 1)
    assert plan_memory(KEPT, 0, "cached", 4, 2).gradient_group == 2


def test_without_products_nothing_is_cached_and_a_gradient_still_keeps_its_graphs():
    plan = plan_memory(KEPT, 1000, "auto", 6, 0)
    assert (plan.cached, plan.keep_forward, plan.gradient_group, plan.cached_bytes) == (False, True, 6, 0)


def test_one_segment_keeps_nothing_between_segments():
    plan = plan_memory(KeptBytes(weights=0, graphs=50, forward_graphs=0, inputs=0), 1, "auto", 6, 2)
    assert not plan.cached and (plan.gradient_group, plan.product_group) == (1, 1)
