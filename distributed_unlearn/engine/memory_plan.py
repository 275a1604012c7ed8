"""What the passes of a round keep in memory: a choice of cost alone, made once a round."""

from dataclasses import dataclass
from typing import Literal

from distributed_unlearn.curvature.cached_size import KeptBytes


@dataclass(frozen=True)
class MemoryPlan:
    """What the passes of a round keep, decided once, the same on every rank. It changes cost, never a result."""

    cached: bool
    """Whether products keep their graphs."""
    keep_forward: bool
    """Whether a gradient keeps the blocks' graphs from forward to backward."""
    gradient_group: int
    """Micro-batches that go through one gradient pass together."""
    product_group: int
    """The same for a product."""
    cached_bytes: int
    """What cached mode would keep between products; 0 where there are none."""


def plan_memory(
    kept: KeptBytes, budget: float, mode: Literal["auto", "cached", "recompute"], num_gradient: int, num_product: int
) -> MemoryPlan:
    """Choose what is kept, from what one micro-batch of the widest records keeps.

    - Products keep their graphs if those of all their micro-batches fit (`auto`) or because they have to (`cached`).
    - A gradient keeps its blocks' graphs (saving the recomputation, F of 4F) if at most two passes are needed for
      that: it then gathers weights no more often than with recomputation. Never where the mode is `recompute`.
    - Else a pass holds the block inputs of as many micro-batches as fit, at least of one.

    Args:
        kept: bytes of one micro-batch of the widest records, largest rank.
        budget: bytes for what is kept, smallest rank.
        mode: as configured.
        num_gradient: micro-batches of the gradient minibatch on each rank.
        num_product: those of the curvature minibatch; 0 where there are no products.
    """
    together = max(1, int(budget // max(kept.inputs, 1)))
    cached_bytes = kept.cached(num_product) if num_product > 0 else 0
    cached = num_product > 0 and (mode == "cached" or (mode == "auto" and cached_bytes <= budget))
    with_graphs = int(max(budget - kept.weights, 0) // max(kept.forward_graphs, 1))
    if cached:
        with_graphs = max(with_graphs, num_product)  # their graphs are a part of what products keep
    keep_forward = mode != "recompute" and 2 * with_graphs >= num_gradient
    return MemoryPlan(
        cached=cached,
        keep_forward=keep_forward,
        gradient_group=min(with_graphs if keep_forward else together, num_gradient),
        product_group=num_product if cached else min(together, num_product),
        cached_bytes=cached_bytes,
    )
