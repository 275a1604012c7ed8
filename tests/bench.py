"""One tiny model and batch with everything a `Linearisation` needs, on one rank without a process group."""

import torch

from distributed_unlearn.curvature.layout import add_to_rows, build_layout, empty_rows, unpack, zero_frozen_rows
from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.curvature.reference import double_backward, frozen_rows, gauss_newton_product
from distributed_unlearn.curvature.segments import find_segments, trainable_names
from distributed_unlearn.curvature.store import SegmentStore
from distributed_unlearn.curvature.trace import LossShare
from tests.answer_losses import token_nll
from tests.families import random_tangent

EXACT = 1e-12
"""Rounding of a few thousand float64 operations is about 1e-14."""


class OneRank:
    """The collectives of a group of one; counts what is gathered."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.num_gathers = 0

    def all_gather(self, local):
        self.num_gathers += 1
        return local.clone()

    def reduce_scatter(self, full):
        return full.clone()

    def all_reduce_sum(self, values):
        return values.clone()


class ModelWeights:
    """A segment's weights straight from the model."""

    def __init__(self, model):
        self.parameters = dict(model.named_parameters())

    def segment_weights(self, segment):
        slots = (*segment.trainable, *segment.frozen)
        return {slot.name: self.parameters[slot.qualified_name].detach() for slot in slots}


class Bench:
    """One model and batch with everything a `Linearisation` needs, and vectors by parameter name."""

    def __init__(self, model, batch, trainable="all", share=None):
        self.model, self.batch = model, batch
        self.num_tokens = share or int(batch.answer_mask[:, 1:].sum())
        self.segmented = find_segments(model)
        parameters = dict(model.named_parameters())
        self.names = trainable_names(model, trainable)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.layout = build_layout(self.segmented, shapes, self.names, frozen_rows(model), 1)
        self.dtype = next(iter(parameters.values())).dtype
        self.store = SegmentStore(self.layout, OneRank(), ModelWeights(model), self.dtype)

    def loss_of_logits(self, logits):
        return token_nll(logits, self.batch.input_ids, self.batch.answer_mask)[0].sum() / self.num_tokens

    def share(self):
        return LossShare(self.batch.inputs, self.loss_of_logits)

    def linearise(self, product="hessian", mode="recompute", shares=None):
        return Linearisation(
            self.segmented, self.store, shares or [self.share()], product,
            cached=mode == "cached", keep_forward=mode == "keep_forward",
        )  # fmt: skip

    def zeros(self):
        return torch.zeros(self.layout.vector_numel, dtype=self.dtype)

    def flatten(self, named):
        parts = []
        for segment in self.layout.segments:
            rows = empty_rows(segment.trainable, 1, self.zeros())
            for slot in segment.trainable:
                add_to_rows(rows, slot, named[slot.qualified_name])
            zero_frozen_rows(rows, segment.trainable)
            parts.append(rows.view(-1))
        return torch.cat(parts)

    def named(self, vector):
        result = {}
        for segment in self.layout.segments:
            full = unpack(vector[segment.start : segment.stop], segment.trainable, 1)
            result.update({slot.qualified_name: full[slot.name] for slot in segment.trainable})
        return result

    def tangent(self, seed):
        """Every trainable entry, those of frozen rows included."""
        every = random_tangent(self.model, seed)
        return {name: every[name] for name in every if name in self.names}

    def vector(self, tangent):
        parts = [tangent[slot.qualified_name].reshape(-1) for s in self.layout.segments for slot in s.trainable]
        return torch.cat(parts)

    def product(self, seed, product="hessian", mode="recompute"):
        result = self.zeros()
        self.linearise(product, mode).product(self.vector(self.tangent(seed)), result)
        return result

    def logits(self, model):
        return model(**self.batch.inputs, use_cache=False).logits

    def truth(self, tangent, product="hessian"):
        if product == "gauss_newton":
            return gauss_newton_product(self.model, self.logits, self.loss_of_logits, tangent)
        return double_backward(self.model, lambda model: self.loss_of_logits(self.logits(model)), tangent)


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
