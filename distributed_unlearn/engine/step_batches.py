"""A step's two minibatches as this rank's micro-batches: what they share, and how a part stands for the whole.

The curvature minibatch C is the head of the gradient minibatch B in each role, and B's records come in random order:
C is a simple random sample of B by role. Its loss is the sample's estimate of B's,

    L_C = sum over roles (N_B / N_C) * sum over C's records of the role of what they add to L_B,

with N the number of records of the role: at any weights an unbiased estimate, and so are its gradient and its Hessian
(Horvitz and Thompson 1952). Where both roles are sampled alike, `N_B / N_C` is one number for both, and
C's micro-batches are micro-batches of B: one graph serves the gradient of B and, times that number, products with C.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from distributed_unlearn.data.batches import Corpus
from distributed_unlearn.engine.inputs import MicroBatch, Minibatch, minibatch_totals
from distributed_unlearn.objectives.predictions import MinibatchTotals
from distributed_unlearn.workers.messages import Indices

MakeMicroBatches = Callable[[Minibatch, MinibatchTotals], list[MicroBatch]]


@dataclass(frozen=True)
class Part:
    """Micro-batches that go through the model together."""

    batches: list[MicroBatch]
    is_forget: bool
    """All of them hold forget records alone, and the forget part of the gradient is wanted."""


@dataclass(frozen=True)
class StepBatches:
    """One step on this rank."""

    gradient: Minibatch
    curvature: Minibatch
    curvature_parts: list[Part]
    rest_parts: list[Part]
    """What else the gradient minibatch has; all of it where nothing is shared."""
    is_shared: bool
    """Whether the curvature's micro-batches are a part of the gradient's."""
    scale: float
    """`L_C` is this times what the curvature's micro-batches add up to."""

    @property
    def curvature_batches(self) -> list[MicroBatch]:
        """In order, forget records first where they are drawn by role."""
        return [micro for part in self.curvature_parts for micro in part.batches]

    @property
    def rest_batches(self) -> list[MicroBatch]:
        """What else the gradient minibatch has."""
        return [micro for part in self.rest_parts for micro in part.batches]

    @property
    def gradient_batches(self) -> list[MicroBatch]:
        """All of the gradient minibatch."""
        return [*self.curvature_batches, *self.rest_batches] if self.is_shared else self.rest_batches

    def by_role(self) -> tuple[tuple[Indices, int], tuple[Indices, int]]:
        """Of forget and of retain records: those of the curvature minibatch, and how many the gradient's are."""
        b, c = self.gradient, self.curvature
        return (c.forget, len(b.forget)), (c.retain, len(b.retain))


def share_batches(
    corpus: Corpus, gradient: Minibatch, curvature: Minibatch, by_role: bool, make: MakeMicroBatches
) -> StepBatches:
    """Cut both minibatches into micro-batches, shared ones where a role's share of the records is that of the other.

    Args:
        corpus: counts tokens.
        gradient: B.
        curvature: C, the head of B in each role.
        by_role: no micro-batch of B mixes roles.
        make: a minibatch and the counts to divide by -> micro-batches.
    """
    totals = minibatch_totals(corpus, gradient)
    shares = len(curvature.forget) * len(gradient.retain) == len(curvature.retain) * len(gradient.forget)
    parts = _split if by_role else _whole
    if not shares:
        scaled = _scaled(totals, gradient, curvature)
        own = _whole(curvature, scaled, make)
        return StepBatches(gradient, curvature, own, parts(gradient, totals, make), False, 1.0)
    rest = Minibatch(gradient.forget[len(curvature.forget) :], gradient.retain[len(curvature.retain) :])
    scale = len(gradient) / max(len(curvature), 1)
    rest_parts = parts(rest, totals, make) if len(rest) else []
    return StepBatches(gradient, curvature, parts(curvature, totals, make), rest_parts, True, scale)


def _whole(minibatch: Minibatch, totals: MinibatchTotals, make: MakeMicroBatches) -> list[Part]:
    return [Part(make(minibatch, totals), is_forget=False)]


def _split(minibatch: Minibatch, totals: MinibatchTotals, make: MakeMicroBatches) -> list[Part]:
    none = minibatch.forget[:0]
    return [
        Part(make(Minibatch(minibatch.forget, none), totals), is_forget=True),
        Part(make(Minibatch(none, minibatch.retain), totals), is_forget=False),
    ]


def _scaled(totals: MinibatchTotals, gradient: Minibatch, curvature: Minibatch) -> MinibatchTotals:
    """Counts of B times `N_C / N_B` of their role: sums over C, divided by these, are estimates for B."""
    forget, retain = (
        len(part) / max(len(whole), 1)
        for part, whole in ((curvature.forget, gradient.forget), (curvature.retain, gradient.retain))
    )
    return replace(
        totals,
        num_forget_records=totals.num_forget_records * forget,
        num_retain_records=totals.num_retain_records * retain,
        num_forget_tokens=totals.num_forget_tokens * forget,
        num_retain_tokens=totals.num_retain_tokens * retain,
    )


def positions_of(records: Indices, within: Indices) -> np.ndarray:
    """Where each of some distinct records stands in `within`, which has all of them."""
    order = np.argsort(within, kind="stable")
    return order[np.searchsorted(within, records, sorter=order)]
