"""What is computed on ranks and, in float64 on one plain module, as its truth."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from distributed_unlearn.config import CurvatureConfig, ObjectiveConfig, SCureNewtonConfig, TrainConfig
from distributed_unlearn.config.objective import ObjectiveName
from distributed_unlearn.curvature.layout import FlatLayout
from distributed_unlearn.curvature.precision import LiftFloat32Casts
from distributed_unlearn.curvature.reference import double_backward, frozen_rows
from distributed_unlearn.data.encoding import EncodedCorpus, collate
from distributed_unlearn.data.sampling import draw
from distributed_unlearn.engine.check import CurvatureCheck
from distributed_unlearn.engine.inputs import Minibatch, minibatch_totals
from distributed_unlearn.engine.oracle import RoundSpec
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.objectives.constants import RoundConstants, uniform_numbers
from distributed_unlearn.objectives.predictions import Constants, MinibatchTotals, Predictions
from distributed_unlearn.solvers.inner.krylov import KrylovEntry, KrylovSpec
from distributed_unlearn.solvers.methods.scurenewton import SCureNewton, SCureNewtonSettings
from distributed_unlearn.solvers.protocols import StepSpec
from tests.dense import FreeEntries
from tests.engine.checkpoints import FORGET, RETAIN, random_corpus
from tests.solvers.memory_oracle import MemoryOracle

HOLDOUT_LOSS = 5.5
KRYLOV_STEPS = 3
VECTOR_SEED = 11
KRYLOV = StepSpec(KrylovSpec())
SETTINGS = SCureNewtonSettings(max_krylov_steps=KRYLOV_STEPS, cubic_coefficient=1.0)

# 9 records in micro-batches of 2: of two ranks the first has an empty third one.
# A decay that is seen beside AdamW's own steps.
TRAINING = TrainConfig(epochs=2, batch_size=9, learning_rate=1e-3, warmup_share=0.3, weight_decay=3.0)
# Learning rates of the first-order steps, by method, and their weight decay.
RATES: dict[Literal["adamw", "sgd"], tuple[float, ...]] = {"adamw": (1e-2, 2e-2, 5e-3), "sgd": (1e-1, 2e-1, 5e-2)}
DECAY = 0.3
TRAINABLE: dict[str, Literal["all"] | tuple[str, ...]] = {"all": "all", "some": ("*.mlp.*", "*embed_tokens*")}


@dataclass(frozen=True)
class Problem:
    """One objective on one minibatch of one checkpoint."""

    checkpoint: str = "odd_llama"
    objective: ObjectiveName = "holdout_matched"
    options: tuple[tuple[str, Any], ...] = ()
    """Further settings of the objective."""
    gradient_batch: int = 9
    curvature_batch: int = 5


@dataclass(frozen=True)
class Case:
    """A problem, computed in one particular way, which must not matter."""

    problem: Problem
    world_size: int
    zero_stage: int
    micro_batch_size: int
    mode: Literal["cached", "recompute"]

    def __str__(self) -> str:
        problem = self.problem
        return (
            f"{problem.checkpoint}-{problem.objective}{''.join(f'-{value}' for _, value in problem.options)}"
            f"-{problem.gradient_batch}-ranks{self.world_size}"
            f"-stage{self.zero_stage}-micro{self.micro_batch_size}-{self.mode}"
        )


@dataclass(frozen=True)
class Plan:
    """What one set of ranks does in its life."""

    folder: Path
    """Of the checkpoints."""
    corpus: EncodedCorpus
    cases: tuple[Case, ...] = ()
    stages: tuple[int, ...] = ()
    """Stages at which everything but the cases is done."""
    export_stages: tuple[int, ...] = ()
    checks: tuple[tuple[str, str, CurvatureCheck], ...] = ()
    """(checkpoint, dtype, check) at stage 3."""
    training_stages: tuple[int, ...] = ()
    refuses: bool = False
    breaks_reductions: bool = False


def objective_of(problem: Problem) -> ObjectiveConfig:
    """The problem's objective section."""
    return ObjectiveConfig(name=problem.objective, **dict(problem.options))


def round_constants(corpus: EncodedCorpus) -> RoundConstants:
    """Made-up constants of every record that may be drawn: no token's are like another's."""
    indices = np.concatenate([FORGET, RETAIN])
    counts = corpus.num_answer_tokens(indices)
    values = np.random.default_rng(7).standard_normal((3, counts.sum()))
    return RoundConstants(indices, counts, 4 + values[0], -4 + values[1], -2 + 2 * values[2], np.empty(0))


def round_spec(problem: Problem, micro_batch_size: int = 4, mode: str = "recompute") -> RoundSpec:
    """What the driver would send."""
    return RoundSpec(
        round_index=1,
        forget=FORGET,
        retain=RETAIN,
        objective=objective_of(problem),
        solver=SCureNewtonConfig(
            gradient_batch=problem.gradient_batch,
            curvature_batch=problem.curvature_batch,
            max_krylov_steps=KRYLOV_STEPS,
            cubic_coefficient=SETTINGS.cubic_coefficient,
        ),
        curvature=CurvatureConfig(product="hessian", mode=mode, micro_batch_size=micro_batch_size),  # type: ignore[arg-type]
        holdout_loss=HOLDOUT_LOSS,
        constants=round_constants(random_corpus()),
    )


def _roles(problem: Problem, size: int) -> tuple[int, int]:
    return (0, size) if problem.objective == "retain" else (size // 2, size - size // 2)


def minibatch_of(problem: Problem, size: int, step: int = 0) -> Minibatch:
    """A step's minibatch of `size` records: the head of its gradient minibatch."""
    drawn, wanted = _roles(problem, problem.gradient_batch), _roles(problem, size)
    return Minibatch(
        draw(0, 1, step, "forget", FORGET, drawn[0])[: wanted[0]],
        draw(0, 1, step, "retain", RETAIN, drawn[1])[: wanted[1]],
    )


def assemble(parts: list[torch.Tensor], layout: FlatLayout) -> dict[str, torch.Tensor]:
    """Full parameters from every rank's part of a vector, without any collective; padding must be zero."""
    named = {}
    for segment in layout.segments:
        for slot in segment.trainable:
            begin = segment.start + slot.offset
            full = torch.cat([part[begin : begin + slot.shard_numel] for part in parts])
            assert not full[slot.numel :].any(), f"padding of {slot.qualified_name} is not zero"
            named[slot.qualified_name] = full[: slot.numel].view(slot.shape)
    return named


@dataclass(frozen=True)
class Truth:
    """The same quantities in float64, whole minibatch at once, one module, other code for every derivative."""

    loss: float
    gradient: torch.Tensor
    hvp: torch.Tensor
    diagonals: list[float]
    off_diagonals: list[float]
    record: Any
    coefficient: float
    """M after the step."""
    update: torch.Tensor
    entries: FreeEntries
    """Flattens dictionaries of full parameters into the free entries."""


def load_float64(path: str) -> torch.nn.Module:
    """The module of a checkpoint, or of an adapter folder on its base, under the base's names."""
    adapter = Path(path) / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else path
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    if adapter.exists():
        model = PeftModel.from_pretrained(model, path, is_trainable=True).base_model.model
    return model.double().eval()


def totals_of(corpus: EncodedCorpus, problem: Problem, part: Minibatch, step: int = 0) -> MinibatchTotals:
    """The gradient minibatch's counts, in each role times the part's share of the records."""
    whole = minibatch_of(problem, problem.gradient_batch, step)
    counts = minibatch_totals(corpus, whole)
    forget, retain = len(part.forget) / max(len(whole.forget), 1), len(part.retain) / max(len(whole.retain), 1)
    return MinibatchTotals(
        counts.num_forget_records * forget,
        counts.num_retain_records * retain,
        counts.num_forget_tokens * forget,
        counts.num_retain_tokens * retain,
    )


def loss_on(
    corpus: EncodedCorpus, problem: Problem, size: int, step: int, start: torch.nn.Module, retain_weight: float = 1.0
) -> Callable[[torch.nn.Module], torch.Tensor]:
    """The objective on a step's first `size` records, all at once, of a module; the round began with `start`."""
    minibatch = minibatch_of(problem, size, step)
    totals = totals_of(corpus, problem, minibatch, step)
    return loss_of(corpus, problem, minibatch, totals, start, retain_weight)


def loss_of(
    corpus: EncodedCorpus,
    problem: Problem,
    minibatch: Minibatch,
    totals: MinibatchTotals,
    start: torch.nn.Module,
    retain_weight: float = 1.0,
) -> Callable[[torch.nn.Module], torch.Tensor]:
    """The objective on some records, divided by `totals`; the round began with `start`."""
    weighted = objective_of(problem).model_copy(update={"retain_weight": retain_weight})
    objective = build_objective(weighted, HOLDOUT_LOSS)
    chosen = np.concatenate([minibatch.forget, minibatch.retain])
    tokens = collate(corpus, chosen)
    is_forget = torch.arange(len(chosen)) < len(minibatch.forget)
    known = round_constants(corpus)
    starts = dict(zip(known.indices.tolist(), np.cumsum(known.num_tokens) - known.num_tokens, strict=True))
    columns = [
        [column[starts[int(i)] + k] for i in chosen for k in range(corpus.num_answer_tokens(chosen[chosen == i])[0])]
        for column in (known.start_nll, known.start_log_odds, known.target_log_odds)
    ]
    columns.append(uniform_numbers(known.label_seed, chosen, corpus.num_answer_tokens(chosen)).tolist())
    constants = Constants(*(torch.tensor(column, dtype=torch.float64) for column in columns))

    record, position = (tokens.answer_mask & (torch.arange(tokens.answer_mask.shape[1]) > 0)).nonzero(as_tuple=True)
    labels = tokens.input_ids[record, position]

    def rows(module: torch.nn.Module) -> torch.Tensor:
        logits = module(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False).logits
        return logits[record, position - 1]

    with torch.no_grad(), LiftFloat32Casts():
        start_rows = rows(start)

    def loss(module: torch.nn.Module) -> torch.Tensor:
        return objective(Predictions(rows(module), labels, record, is_forget, constants, start_rows), totals)

    return loss


def compute_truth(folder: Path, corpus: EncodedCorpus, problem: Problem, vector: dict[str, torch.Tensor]) -> Truth:
    """`vector` is the direction of `hvp`, by parameter name."""
    model = load_float64(str(folder / problem.checkpoint))
    on_gradient, on_curvature = (
        loss_on(corpus, problem, size, 0, model) for size in (problem.gradient_batch, problem.curvature_batch)
    )
    direction = {name: value.double() for name, value in vector.items()}
    with LiftFloat32Casts():
        first = double_backward(model, on_gradient, direction)
        second = double_backward(model, on_curvature, direction)
        entries = FreeEntries(model, list(direction), frozen_rows(model))

        def make_oracle() -> MemoryOracle:
            bound = entries.bind(on_gradient), entries.bind(on_curvature)
            return MemoryOracle(lambda w, step: bound[0](w), entries.point, lambda w, step: bound[1](w))

        oracle = make_oracle()
        oracle.begin_step(0, KRYLOV)
        columns = [KrylovEntry(*oracle.advance()) for _ in range(KRYLOV_STEPS)]
        oracle = make_oracle()
        solver = SCureNewton(oracle, SETTINGS)
        record = solver.step(0)
    return Truth(
        loss=float(first.loss),
        gradient=entries.flatten(first.gradient),
        hvp=entries.flatten(second.hvp),
        diagonals=[column.diagonal for column in columns],
        off_diagonals=[column.off_diagonal for column in columns],
        record=record,
        coefficient=solver.cubic_coefficient,
        update=oracle.weights - entries.point,
        entries=entries,
    )
