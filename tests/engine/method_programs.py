"""What the ranks compute of published methods: steps on objectives of their own, dampening, a retraining."""

import dataclasses
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed_unlearn.config import (
    ModelConfig,
    ObjectiveConfig,
    PublishedConfig,
    RmuConfig,
    ScrubConfig,
    SteppingConfig,
)
from distributed_unlearn.data.encoding import EncodedCorpus
from distributed_unlearn.engine.worker import Worker
from distributed_unlearn.solvers.inner.first_order import SgdSpec
from distributed_unlearn.solvers.protocols import StepSpec
from distributed_unlearn.workers.client import RemoteOracle
from distributed_unlearn.workers.messages import DampeningSpec, TrainingSpec
from tests.engine.cases import TRAINING, Problem, round_spec
from tests.engine.checkpoints import FORGET, NUM_RECORDS, RETAIN
from tests.engine.ranks import Place, join_worker
from tests.engine.solver_programs import OwnWorker

RATE, NUM_STEPS = 0.3, 6
STEPPING: dict[str, tuple[SteppingConfig, ObjectiveConfig]] = {
    "random_labels": (PublishedConfig(method="random_labels", gradient_batch=9), ObjectiveConfig(name="random_labels")),
    "scrub": (
        ScrubConfig(method="scrub", gradient_batch=4, retain_steps=1, forget_steps=1, forget_cycles=2),
        ObjectiveConfig(name="scrub", distillation_weight=0.7, forget_weight=0.5),
    ),
    "rmu": (
        RmuConfig(method="rmu", gradient_batch=9, layer=0),
        ObjectiveConfig(name="rmu", steering_coefficient=2.0, retain_weight=3.0),
    ),
}
SAMPLE = RETAIN[1:8]
DAMPENING = DampeningSpec(1.3, 0.6, num_forget=len(FORGET), num_sampled=len(SAMPLE), num_retain=len(RETAIN))


@dataclass(frozen=True)
class MethodPlan:
    """Checkpoints of `folder`, and the stages."""

    folder: Path
    corpus: EncodedCorpus
    stages: tuple[int, ...]
    retraining_stages: tuple[int, ...]

    def model(self, name: str) -> ModelConfig:
        return ModelConfig(path=str(self.folder / name))


def run_methods(place: Place, plan: MethodPlan) -> None:
    """Every section into a file. All ranks must call this."""
    worker = join_worker(place)
    worker.set_corpus(plan.corpus)
    with place.file("sections").open("wb") as file:
        for section in _sections(worker, plan):
            pickle.dump(section, file)
            file.flush()


def _sections(worker: Worker, plan: MethodPlan) -> Iterator[tuple[str, Any]]:
    for stage in plan.stages:
        for name, (solver, objective) in STEPPING.items():
            yield f"{name} {stage}", _steps(worker, plan, stage, solver, objective)
        yield f"ssd {stage}", _dampened(worker, plan, stage)
    for stage in plan.retraining_stages:
        yield f"retrain {stage}", _retrained(worker, plan, stage)


def _steps(
    worker: Worker, plan: MethodPlan, stage: int, solver: SteppingConfig, objective: ObjectiveConfig
) -> dict[str, Any]:
    """Plain gradient steps on what the method draws: Adam would turn rounding into steps."""
    worker.open_model(plan.model("odd_llama"), "float32", stage)
    spec = dataclasses.replace(round_spec(Problem(), micro_batch_size=2), solver=solver, objective=objective)
    worker.begin_round(spec)
    oracle, losses = RemoteOracle(OwnWorker(worker)), []  # type: ignore[arg-type]
    for step in range(NUM_STEPS):
        losses.append(oracle.begin_step(step, StepSpec(SgdSpec(weight_decay=0.0))).loss)
        oracle.candidate(RATE)
        oracle.accept()
    return {"losses": losses, "weights": worker.opened.weights.master.clone(), "layout": worker.opened.layout}


def _dampened(worker: Worker, plan: MethodPlan, stage: int) -> dict[str, Any]:
    worker.open_model(plan.model("odd_llama"), "float32", stage)
    before = worker.opened.weights.master.clone()
    worker.begin_dampening()
    worker.add_importance("forget", FORGET[:3])
    worker.add_importance("forget", FORGET[3:])
    worker.add_importance("retain", SAMPLE)
    assert worker._dampening is not None
    sums = {role: found.clone() for role, found in worker._dampening._sums.items()}
    done = worker.dampen(DAMPENING)
    after = worker.opened.weights.master.clone()
    layout, norm = worker.opened.layout, worker.round_update_norm()
    return {"layout": layout, "sums": sums, "before": before, "after": after, "done": done, "norm": norm}


def _retrained(worker: Worker, plan: MethodPlan, stage: int) -> dict[str, Any]:
    """Three steps from one checkpoint while another one is open, and the same steps as a training."""
    spec = TrainingSpec(plan.model("odd_llama"), TRAINING, np.arange(NUM_RECORDS), stage, 2, 0)
    found: dict[str, Any] = {}
    worker.begin_training(spec)
    found["losses"] = [worker.train_step(step) for step in range(3)]
    worker.finish_training()
    found["trained"] = worker.opened.weights.master.clone()

    worker.open_model(plan.model("other_llama"), "float32", 3)
    found["open"] = worker.opened.weights.master.clone()
    worker.begin_retraining(spec)
    found["again"] = [worker.train_step(step) for step in range(3)]
    worker.finish_retraining()
    weights, space = worker.opened.weights.master, worker.opened.space
    found["retrained"] = weights.clone()
    found["norms"] = worker.round_update_norm(), space.norm(weights - found["open"])
    found["scores"] = worker.score(np.arange(NUM_RECORDS), 4)
    return found
