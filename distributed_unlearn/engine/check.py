"""Compare gradient and curvature product on shards with an unsharded float64 reference.

The reference is built from the master weights that the shards hold, so that only the arithmetic differs (and, in
bfloat16, the rounding of weights and direction that belongs to it). It shares no code with the fast product: plain
double backward, or central differences of gradients where the model is too large for that.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.curvature.precision import LiftFloat32Casts
from distributed_unlearn.curvature.reference import (
    Reference,
    central_difference,
    double_backward,
    gauss_newton_product,
)
from distributed_unlearn.curvature.trace import LossShare
from distributed_unlearn.data.sampling import cut
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.models.adapters import insert_layers
from distributed_unlearn.models.family import CheckBatch, build
from distributed_unlearn.workers.messages import CurvatureCheck, CurvatureReport


def _loss_of(batch: CheckBatch, num_labels: int) -> Callable[[Tensor], Tensor]:
    """This batch's share of the mean negative log likelihood of all `num_labels` labels."""

    def loss(logits: Tensor) -> Tensor:
        wide = logits.reshape(-1, logits.shape[-1])
        wide = wide if wide.dtype == torch.float64 else wide.float()
        return cross_entropy(wide, batch.labels.reshape(-1), ignore_index=-100, reduction="sum") / num_labels

    return loss


@contextmanager
def _lifted(dtype: torch.dtype) -> Iterator[None]:
    context: AbstractContextManager[object] = LiftFloat32Casts() if dtype == torch.float64 else nullcontext()
    with context:
        yield


def _gather_named(opened: OpenedModel, vector: Tensor) -> dict[str, Tensor]:
    """Full float64 CPU tensors of a sharded vector, on rank 0; empty elsewhere. All ranks must call this."""
    communicator, named = opened.communicator, {}
    for segment in opened.layout.segments:
        for slot in segment.trainable:
            begin = segment.start + slot.offset
            full = communicator.all_gather(vector[begin : begin + slot.shard_numel])
            if communicator.rank == 0:
                named[slot.qualified_name] = full[: slot.numel].view(slot.shape).double().cpu()
    return named


def _reference_model(opened: OpenedModel) -> nn.Module | None:
    """An unsharded float64 copy of the weights, on rank 0. All ranks must call this."""
    on_zero = opened.communicator.rank == 0
    model = None
    if on_zero:
        model = build(opened.family, copy.deepcopy(opened.config))
        if opened.adapter is not None:
            insert_layers(model, copy.deepcopy(opened.adapter.settings))
        model = model.double().eval()
    targets = {} if model is None else dict(model.named_parameters())
    for segment in opened.layout.segments:
        for slot in (*segment.trainable, *segment.frozen):
            full = opened.weights.gather_parameter(segment, slot)
            if on_zero:
                targets[slot.qualified_name].data.copy_(full.double().cpu())
    if model is not None:
        for name, buffer in opened.model.named_buffers():
            model.get_buffer(name).copy_(buffer.double().cpu())
    return model


def _fits_double_backward(num_parameters: int) -> bool:
    # Weights, gradient, its graph and the product in float64, and as much again for activations.
    return num_parameters * 8 * 10 < psutil.virtual_memory().available


def _compute_reference(
    model: nn.Module, check: CurvatureCheck, batch: CheckBatch, constants: dict[str, Any], tangent: dict[str, Tensor]
) -> tuple[Reference, str]:
    loss_of_logits = _loss_of(batch, batch.num_labels)
    inputs = LossShare(batch.inputs, loss_of_logits).in_dtype(torch.float64).inputs

    def logits_fn(module: nn.Module) -> Tensor:
        logits: Tensor = module(**constants, **inputs).logits
        return logits

    with LiftFloat32Casts():
        if check.product == "gauss_newton":
            return gauss_newton_product(model, logits_fn, loss_of_logits, tangent), "double_vjp"
        size = sum(p.numel() for p in model.parameters())
        automatic = "double_backward" if _fits_double_backward(size) else "central_difference"
        method = automatic if check.reference == "auto" else check.reference
        if method == "double_backward":
            return double_backward(model, lambda m: loss_of_logits(logits_fn(m)), tangent), method
        return central_difference(model, lambda m: loss_of_logits(logits_fn(m)), tangent, 1e-4), method


def _relative(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    error = sum(float((ours[name] - truth[name].double()).square().sum()) for name in truth)
    scale = sum(float(value.double().square().sum()) for value in truth.values())
    return (error / max(scale, 1e-300)) ** 0.5


def _now(device: torch.device) -> float:
    """Seconds on a clock, after everything that the device was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_curvature(opened: OpenedModel, check: CurvatureCheck) -> CurvatureReport | None:
    """Run the check; rank 0 returns the report. All ranks must call this."""
    communicator, space = opened.communicator, opened.space
    batch = opened.family.check_batch(opened.config, check.batch_size, check.sequence_length, check.seed)
    chosen = cut(np.arange(check.batch_size), communicator.rank, communicator.world_size)
    device, mine = communicator.device, batch.rows(torch.from_numpy(chosen)).to(communicator.device)
    master = opened.weights.master
    u, v = (space.random_normal(master, check.seed + k) for k in (1, 2))
    v /= space.norm(v)
    u /= space.norm(u)
    gradient, product, adjoint = (torch.zeros_like(master) for _ in range(3))
    with _lifted(opened.store.compute_dtype):
        linearisation = Linearisation(
            opened.segmented,
            opened.store,
            [LossShare(mine.inputs, _loss_of(mine, batch.num_labels))],
            check.product,
            cached=check.mode == "cached",
        )
        started = _now(device)
        local = linearisation.gradient(gradient)
        gradient_seconds = _now(device) - started
        before, started = communicator.num_elements_moved, _now(device)
        linearisation.product(v, product)
        product_seconds = _now(device) - started
        moved = communicator.num_elements_moved - before
        linearisation.product(u, adjoint)
    loss = float(communicator.all_reduce_sum(local.double().reshape(1))[0])
    products = space.dots([product, v], u)[0], space.dots([adjoint], v)[0]
    symmetry = abs(products[0] - products[1]) / max(space.norm(product), 1e-300)
    named = [_gather_named(opened, vector) for vector in (gradient, product, v)]
    model = _reference_model(opened)
    if model is None:
        return None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named[2])
    truth, method = _compute_reference(model, check, batch, opened.family.constants, named[2])
    slots = [slot for part in opened.layout.segments for slot in part.trainable]
    return CurvatureReport(
        loss_relative_error=abs(loss - float(truth.loss)) / abs(float(truth.loss)),
        gradient_relative_error=_relative(named[0], truth.gradient),
        hvp_relative_error=_relative(named[1], truth.hvp),
        symmetry_error=symmetry,
        segments=len(opened.layout.segments),
        mode=check.mode,
        product=check.product,
        reference=method,
        num_parameters=opened.facts().num_parameters,
        world_size=communicator.world_size,
        frozen_rows=sum(slot.frozen_row is not None for slot in slots),
        gradient_seconds=gradient_seconds,
        product_seconds=product_seconds,
        elements_moved_per_parameter=moved / opened.layout.num_trainable,
    )
