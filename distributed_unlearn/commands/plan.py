"""`plan`: validate a job, resolve its data and say what it will need, without touching the weights."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console

from distributed_unlearn.commands.console_events import (
    describe_data,
    print_line,
    say_statistics,
    warn_of_fallback,
    warn_of_ids_files,
    warn_of_reference,
)
from distributed_unlearn.config import (
    AdamWConfig,
    CubicConfig,
    CureNewtonConfig,
    DampedNewtonConfig,
    JobConfig,
    ObjectiveConfig,
    PinvNewtonConfig,
    PublishedConfig,
    RetrainConfig,
    RmuConfig,
    ScrubConfig,
    SCureNewtonConfig,
    SecondOrderConfig,
    SgdConfig,
    SsdConfig,
    SteppingConfig,
    TrainingSettings,
)
from distributed_unlearn.curvature.layout import FlatLayout
from distributed_unlearn.data.prepare import PreparedData
from distributed_unlearn.data.sampling import num_micro_batches
from distributed_unlearn.engine.estimate import (
    MemoryEstimate,
    ModelSize,
    elements_per_gradient,
    elements_per_loss,
    elements_per_product,
    elements_per_refresh,
    estimate_memory,
    estimate_training_memory,
    measure_model,
)
from distributed_unlearn.engine.training import plan_training
from distributed_unlearn.models.base_of_adapter import opened_as
from distributed_unlearn.models.checkpoint import load_model_config
from distributed_unlearn.models.stored import held_dtype, stored_tensors
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.report.tables import facts_table
from distributed_unlearn.rounds.preparation import prepare, training_records
from distributed_unlearn.solvers.inner.explicit import refuse_if_too_large

Row = tuple[str, str, str]


class PlanRow(NamedTuple):
    """One line of a plan."""

    quantity: str
    value: str
    explanation: str


@dataclass(frozen=True)
class Plan:
    """What a job would do and need."""

    data: PreparedData
    rows: tuple[PlanRow, ...]
    segment_fallback: str | None
    """Why the whole model is one segment, where it is."""
    num_batch_norms: int
    """Layers of batch normalisation, which use their running statistics."""


def make_plan(job: JobConfig) -> Plan:
    """The estimate, without workers and weights.

    Raises:
        UserError: every mistake that a run would refuse before loading weights.
    """
    prepared = prepare(job)
    hf_config = load_model_config(job.model)
    stored = held_dtype(stored_tensors(opened_as(job.model)))  # as the workers open it
    size = measure_model(job.model, hf_config, job.cluster.num_workers, job.cluster.zero_stage, stored)
    if job.train is None and isinstance(job.solver, CureNewtonConfig | PinvNewtonConfig):
        refuse_if_too_large(size.num_trainable, job.solver.max_parameters)
    found = [PlanRow(*row) for row in (*_model_rows(size, job), *_job_rows(size, hf_config, job, prepared))]
    return Plan(prepared, tuple(found), size.fallback_reason, size.num_batch_norms)


def run_plan(job: JobConfig, console: Console) -> None:
    """Print the estimate.

    Raises:
        UserError: see `make_plan`.
    """
    plan = make_plan(job)
    print_line(console, describe_data(plan.data))
    warn_of_ids_files(console, job)
    warn_of_reference(console, job, plan.data)
    warn_of_fallback(console, plan.segment_fallback)
    say_statistics(console, plan.num_batch_norms)
    console.print(facts_table("Plan", ("quantity", "value", "unit, why"), plan.rows))
    console.print("the job is valid; nothing was loaded or written", highlight=False)


def _job_rows(size: ModelSize, hf_config: Any, job: JobConfig, prepared: PreparedData) -> list[Row]:
    solver = job.solver
    if job.train is not None:
        return _training_rows(size, hf_config, job, job.train, prepared, len(training_records(job, prepared)))
    if isinstance(solver, RetrainConfig):
        rounds, retain = len(prepared.partition.forget_rounds), len(prepared.partition.retain(0))
        rows = _training_rows(size, hf_config, job, solver, prepared, retain)
        return [("rounds", f"{rounds}", "each trains anew, from data.base_model; counts are the first's"), *rows]
    if isinstance(solver, SsdConfig):
        return _dampening_rows(size, hf_config, job, solver, prepared)
    return _unlearning_rows(size, hf_config, job, solver, prepared)


def _dampening_rows(
    size: ModelSize, hf_config: Any, job: JobConfig, solver: SsdConfig, prepared: PreparedData
) -> list[Row]:
    dtype: torch.dtype = getattr(torch, job.model.dtype)
    stage, world, partition = job.cluster.zero_stage, job.cluster.num_workers, prepared.partition
    # Two sums of squares, and the factors.
    memory = estimate_memory(size, hf_config, dtype, stage, 3, 1, prepared.report.longest, 1)
    num_forget, num_retain = len(partition.forget_rounds[0]), len(partition.retain(0))
    num_sampled = min(num_retain, solver.max_retain_records or num_retain)
    passes = -(-num_forget // world) + -(-num_sampled // world)
    total = passes * elements_per_gradient(size, stage, True) * dtype.itemsize
    return [
        *_memory_rows(memory),
        ("rounds", f"{len(partition.forget_rounds)}", "one change each; counts are the first's"),
        ("gradients a round", f"{num_forget + num_sampled}", f"one record a rank at a time: {passes} passes"),
        ("communication a round", f"{total / 2**30:.3f} GiB", "a rank; gradients"),
    ]


def _num_vectors(solver: SteppingConfig) -> int:
    """Parameter vectors that a rank holds at once; of second-order methods gradient, work, update and undo copy."""
    match solver:
        case AdamWConfig() | PublishedConfig() | ScrubConfig() | RmuConfig():
            return 4  # gradient, two moments, update
        case SgdConfig():
            return 3 if solver.momentum > 0.0 else 2
        case SCureNewtonConfig():
            basis = {
                "krylov": solver.max_krylov_steps + 1,
                # directions, the remembered steps, and the parts of the gradient
                "subspace": 1 + 2 * solver.subspace_steps + 3 * (solver.subspace_gradient == "by_role"),
                "gradient_descent": 2,
            }[solver.inner]
            metric = 3 if solver.metric == "adam" else 0  # second moment, scale, scaled gradient
            return basis + metric + 4 + _remainder_vectors(solver)
        case DampedNewtonConfig():
            return 3 + 4  # iterate, residual, direction
        case _:
            return 4 + _remainder_vectors(solver)


def _remainder_vectors(solver: SteppingConfig) -> int:
    """One more where accepted steps measure the model's error on the curvature minibatch: its gradient."""
    if not isinstance(solver, CubicConfig) or not solver.adaptive or solver.adaptation != "interpolated":
        return 0
    return int(solver.curvature_batch < solver.gradient_batch)


def _num_teacher_passes(objective: ObjectiveConfig, solver: SteppingConfig) -> int:
    """Forward passes of a step at the round's first weights: one for each minibatch, where the objective reads them."""
    built = build_objective(objective, 0.0)
    if not any(needs is not None and needs.start_logits for needs in (built.forget_needs, built.retain_needs)):
        return 0
    return 1 + (isinstance(solver, SecondOrderConfig) and solver.curvature_batch < solver.gradient_batch)


def _num_products(solver: SteppingConfig, num_trainable: int) -> int:
    """Exact products of a step, at most (rejections of gradient_descent add to it)."""
    match solver:
        case SCureNewtonConfig(inner="krylov"):
            return solver.max_krylov_steps
        case SCureNewtonConfig(inner="subspace"):
            return 1 + (solver.subspace_gradient == "by_role") + solver.subspace_steps
        case SCureNewtonConfig():
            return solver.inner_steps
        case DampedNewtonConfig():
            return solver.max_cg_steps
        case CureNewtonConfig() | PinvNewtonConfig():
            return num_trainable
        case _:
            return 0


def _model_rows(size: ModelSize, job: JobConfig) -> list[Row]:
    segments = f"root {size.root.total:,}, block {size.largest_block.total:,}"
    return [
        ("parameters", f"{size.num_parameters:,}", f"{size.num_trainable:,} trainable"),
        ("segments", f"{size.num_blocks + 1}", segments),
        ("workers", f"{job.cluster.num_workers}", f"ZeRO stage {job.cluster.zero_stage}, {job.model.dtype}"),
    ]


def _gib(value: int) -> str:
    return f"{value / 2**30:.3f} GiB"


def _unlearning_rows(
    size: ModelSize, hf_config: Any, job: JobConfig, solver: SteppingConfig, prepared: PreparedData
) -> list[Row]:
    dtype: torch.dtype = getattr(torch, job.model.dtype)
    stage, micro = job.cluster.zero_stage, job.curvature.micro_batch_size
    world = job.cluster.num_workers
    curvature_batch = solver.curvature_batch if isinstance(solver, SecondOrderConfig) else 0
    # A pass holds the block inputs of all its micro-batches, a product their tangents too.
    held_inputs = max(
        num_micro_batches(solver.gradient_batch, world, micro), 2 * num_micro_batches(curvature_batch, world, micro)
    )
    longest = prepared.report.longest
    memory = estimate_memory(size, hf_config, dtype, stage, _num_vectors(solver), micro, longest, held_inputs)
    return [*_memory_rows(memory), *_round_rows(size, job, solver, prepared)]


def _training_rows(
    size: ModelSize,
    hf_config: Any,
    job: JobConfig,
    settings: TrainingSettings,
    prepared: PreparedData,
    num_records: int,
) -> list[Row]:
    dtype: torch.dtype = getattr(torch, job.model.dtype)
    stage, micro = settings.stage_in(job.cluster), job.curvature.micro_batch_size
    memory = estimate_training_memory(size, hf_config, dtype, stage, micro, prepared.report.longest)
    plan = plan_training(settings, num_records, job.cluster.num_workers, micro)
    accumulation = f"{plan.batch_size} records each, {plan.accumulation_steps} micro-batches of {micro} a rank"
    return [
        ("memory a rank", _gib(memory.total), f"estimate, training at ZeRO stage {stage}"),
        ("  weights", _gib(memory.weights), "partitioned at stage 3"),
        ("  gradients", _gib(memory.gradients), "partitioned from stage 2 on"),
        ("  optimizer states", _gib(memory.optimizer_states), "AdamW; partitioned from stage 1 on"),
        ("  activations", _gib(memory.activations), "one micro-batch, all blocks"),
        ("training records", f"{num_records}", f"{settings.epochs} epochs"),
        ("training steps", f"{plan.num_steps}", accumulation),
    ]


def _memory_rows(memory: MemoryEstimate) -> list[Row]:
    return [
        ("memory a rank", _gib(memory.total), "estimate, recompute mode; cached mode adds what it measures"),
        ("  weights", _gib(memory.weights), "gathered from; fp32 master beside it where they differ"),
        (
            "  vectors",
            _gib(memory.vectors),
            "gradient, inner solver, memory, undo copy; fp32, partitioned",
        ),
        ("  copies on the host", _gib(memory.host_copies), "weights at the start of job and round"),
        ("  gathered segments", _gib(memory.gathered), "root and one block: weights, tangent, two results"),
        ("  activations", _gib(memory.activations), "block inputs of a pass, one block's graph, logits"),
    ]


def _round_rows(size: ModelSize, job: JobConfig, solver: SteppingConfig, prepared: PreparedData) -> list[Row]:
    stage = job.cluster.zero_stage
    products = solver.max_steps * _num_products(solver, size.num_trainable)
    curvature_batch = solver.curvature_batch if isinstance(solver, SecondOrderConfig) else 0
    by_role = (
        isinstance(solver, SCureNewtonConfig) and solver.inner == "subspace" and solver.subspace_gradient != "whole"
    )
    # Of the curvature minibatch, where that is another one, gradient and loss are passes of their own.
    apart = 1 + _remainder_vectors(solver)
    trial = _trial_bytes(size, job, solver, apart)
    if isinstance(solver, RmuConfig):  # later layers take no part in a step
        count = solver.layer_of(size.num_blocks) + 2
        size = replace(size, layout=FlatLayout(size.layout.segments[:count], size.layout.world_size))
    step = (1 + by_role) * apart * elements_per_gradient(size, stage, False)
    step += _num_teacher_passes(job.objective, solver) * elements_per_loss(size, stage)
    product = elements_per_product(size, stage, False)
    item = getattr(torch, job.model.dtype).itemsize
    total = (solver.max_steps * step + products * product) * item
    total += solver.max_steps * trial
    rounds = max(len(prepared.partition.forget_rounds), 1)
    return [
        ("rounds", f"{rounds}", f"at most {solver.max_steps} steps each"),
        ("products a round", f"at most {products}", f"{curvature_batch} records each"),
        ("communication a product", f"{product / max(size.num_trainable, 1):.2f} d", "elements a rank receives"),
        ("communication a round", f"{total / 2**30:.3f} GiB", "a rank, recompute mode; a trial a step, on all records"),
    ]


def _trial_bytes(size: ModelSize, job: JobConfig, solver: SteppingConfig, passes: int) -> int:
    """What a rank receives for one trial on the whole minibatch; a trial that its sample decides takes less.

    In bfloat16 its losses are at the master's precision, before the update as well as after it.
    """
    stage, dtype = job.cluster.zero_stage, getattr(torch, job.model.dtype)
    refresh = elements_per_refresh(size, stage) * dtype.itemsize
    if not isinstance(solver, SecondOrderConfig):
        return refresh
    if dtype == torch.float32:
        return refresh + passes * elements_per_loss(size, stage) * 4
    # The rest is measured before the update only when it is needed: back to those weights, and to the trial's.
    return 3 * refresh + 2 * passes * elements_per_loss(size, stage, exact=True) * 4
