"""The curvature matrices that a product can be with: where they differ, and nothing else."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from distributed_unlearn.curvature.gradient_graph import GradientGraph, MaybeTensors, partial_grad
from distributed_unlearn.curvature.trace import LossOfLogits, Trace

Product = Literal["hessian", "gauss_newton"]


class HeadGraph(NamedTuple):
    """The part of the root from the last cut to the loss, and where its tangents start."""

    graph: GradientGraph
    gradients: MaybeTensors
    """Of cuts and root weights; None where they were used up in an earlier sweep."""
    seed: Tensor | None
    """Tangent of the graph's cotangent."""


class CurvatureOperator(Protocol):
    """A matrix `C` of second derivatives of the loss by the weights, as products `C v`."""

    @property
    def differentiates_gradients(self) -> bool:
        """Whether a block's product needs the graph of its gradient."""
        ...

    def head(
        self,
        trace: Trace,
        loss_of_logits: LossOfLogits,
        leaves: list[Tensor],
        tangents: Sequence[Tensor | None] | None,
        kept: GradientGraph | None,
        second: bool,
    ) -> HeadGraph:
        """Cut the head where this operator has its loss.

        Args:
            trace: a complete one; with `kept` only what is read of it.
            loss_of_logits: the micro-batch's share of the objective.
            leaves: all cuts, then the root's trainable weights.
            tangents: theirs; None where only a gradient is wanted.
            kept: the graph of an earlier sweep.
            second: whether products will be wanted of a new graph.
        """
        ...

    def pull_back(
        self, graph: GradientGraph, tangents: Sequence[Tensor | None], cotangent_tangent: Tensor | None, retain: bool
    ) -> MaybeTensors:
        """The products' parts of a segment's leaves, from the tangents of its leaves and of its cotangent."""
        ...


class HessianOperator:
    """`H = d2L / dw2`."""

    differentiates_gradients = True

    def head(
        self,
        trace: Trace,
        loss_of_logits: LossOfLogits,
        leaves: list[Tensor],
        tangents: Sequence[Tensor | None] | None,
        kept: GradientGraph | None,
        second: bool,
    ) -> HeadGraph:
        """The head with the loss at its end; the loss's own cotangent is the constant 1."""
        if kept is not None:
            return HeadGraph(kept, _none_of(leaves), None)
        assert trace.loss is not None
        graph, gradients = GradientGraph.build(trace.loss, leaves, torch.ones_like(trace.loss), second, retain=True)
        return HeadGraph(graph, gradients, None)

    def pull_back(
        self, graph: GradientGraph, tangents: Sequence[Tensor | None], cotangent_tangent: Tensor | None, retain: bool
    ) -> MaybeTensors:
        """Tangent of the segment's gradient."""
        return graph.pull_back(tangents, cotangent_tangent, retain)


class GaussNewtonOperator:
    """`G = J' (d2L / dlogits2) J` with `J = dlogits / dw` (Schraudolph 2002): `H` without the model's own curvature."""

    differentiates_gradients = False

    def head(
        self,
        trace: Trace,
        loss_of_logits: LossOfLogits,
        leaves: list[Tensor],
        tangents: Sequence[Tensor | None] | None,
        kept: GradientGraph | None,
        second: bool,
    ) -> HeadGraph:
        """The head cut at the logits; its seed is `H_loss dlogits`."""
        if not second:  # a gradient is the same whichever the operator
            return HessianOperator().head(trace, loss_of_logits, leaves, tangents, kept, second)
        assert trace.logits is not None and trace.loss is not None
        trace.loss = trace.loss.detach()  # the loss is differentiated below, by the logits; this graph has no use
        logits = trace.logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = loss_of_logits(logits)
            slope = partial_grad([loss], [logits], [torch.ones_like(loss)], create_graph=tangents is not None)[0]
            cotangent = torch.zeros_like(logits) if slope is None else slope
            graph, gradients = kept, _none_of(leaves)
            if graph is None:
                graph, gradients = GradientGraph.build(trace.logits, leaves, cotangent.detach(), True, retain=True)
            seed = None
            if tangents is not None:
                seed = partial_grad([cotangent], [logits], [graph.push_forward(tangents)])[0]
        return HeadGraph(graph, gradients, seed)

    def pull_back(
        self, graph: GradientGraph, tangents: Sequence[Tensor | None], cotangent_tangent: Tensor | None, retain: bool
    ) -> MaybeTensors:
        """`J'` of the cotangent's tangent."""
        del tangents
        return graph.pull_back_linear(cotangent_tangent, retain)


def _none_of(leaves: list[Tensor]) -> MaybeTensors:
    return [None for _ in leaves]


def operator_of(product: Product) -> CurvatureOperator:
    """The operator that a job file names."""
    match product:
        case "hessian":
            return HessianOperator()
        case "gauss_newton":
            return GaussNewtonOperator()
