"""What the ranks compute of classifiers: loss, gradient and product of a whole step, scores, training and files."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed_unlearn.config import (
    CurvatureConfig,
    ModelConfig,
    ObjectiveConfig,
    SaveConfig,
    SCureNewtonConfig,
    TrainConfig,
)
from distributed_unlearn.engine.minibatch import MinibatchObjective
from distributed_unlearn.engine.worker import Worker
from distributed_unlearn.objectives.constants import RoundConstants
from distributed_unlearn.workers.messages import CurvatureCheck, RoundSpec, TrainingSpec
from tests.classifiers import FORGET, HOLDOUT_LOSS, NUM_RECORDS, RETAIN, TASKS, corpus_for
from tests.engine.ranks import Place, join_worker

VECTOR_SEED = 5
TRAINING = TrainConfig(epochs=1, batch_size=NUM_RECORDS, learning_rate=1e-2, warmup_share=0.0)


@dataclass(frozen=True)
class ClassifierPlan:
    """Checkpoints of `folder`, named as in `TASKS`."""

    folder: Path
    checks: bool

    def model(self, name: str) -> ModelConfig:
        return ModelConfig(path=str(self.folder / name), task=TASKS[name])


def run_classifiers(place: Place, plan: ClassifierPlan) -> None:
    """Every section into a file. All ranks must call this."""
    worker = join_worker(place)
    with place.file("sections").open("wb") as file:
        for section in _sections(worker, plan, place.folder):
            pickle.dump(section, file)
            file.flush()


def _sections(worker: Worker, plan: ClassifierPlan, folder: Path) -> Iterator[tuple[str, Any]]:
    for name in TASKS:
        worker.set_corpus(corpus_for(name))
        for stage, mode, micro in ((0, "recompute", 3), (3, "cached", 1), (3, "recompute", 4)):
            facts = worker.open_model(plan.model(name), "float32", stage)
            key = f"{name} stage {stage} {mode}"
            yield key, {"facts": facts, **_derivatives(worker, name, mode, micro)}
        yield f"scores {name}", worker.score(np.arange(NUM_RECORDS), 3)
        if plan.checks:
            yield f"check {name}", worker.check_curvature(CurvatureCheck(batch_size=3, sequence_length=8))
    for stage in (3, 0):
        yield f"training resnet {stage}", _trained(worker, plan, stage, folder)


def _derivatives(worker: Worker, name: str, mode: str, micro_batch_size: int) -> dict[str, Any]:
    opened = worker.opened
    spec = RoundSpec(
        round_index=0,
        forget=FORGET,
        retain=RETAIN,
        objective=ObjectiveConfig(name="holdout_matched"),
        # Twice the larger role: the whole of both.
        solver=SCureNewtonConfig(gradient_batch=2 * len(RETAIN), curvature_batch=2 * len(RETAIN)),
        curvature=CurvatureConfig(product="hessian", mode=mode, micro_batch_size=micro_batch_size),  # type: ignore[arg-type]
        holdout_loss=HOLDOUT_LOSS,
        constants=RoundConstants.none(),
    )
    objective = MinibatchObjective(opened, corpus_for(name), spec)
    objective.draw(0)
    vector = opened.space.random_normal(opened.weights.master, VECTOR_SEED)
    gradient = opened.weights.master.new_zeros(vector.shape)
    loss = objective.gradient(gradient, for_trials=False).loss
    product = objective.product(vector)
    return {"layout": opened.layout, "loss": loss, "vector": vector, "gradient": gradient, "hvp": product}


def _trained(worker: Worker, plan: ClassifierPlan, stage: int, folder: Path) -> dict[str, Any]:
    """One step on the whole corpus, then the files of the result."""
    worker.set_corpus(corpus_for("resnet"))
    worker.begin_training(TrainingSpec(plan.model("resnet"), TRAINING, np.arange(NUM_RECORDS), stage, 2, 0))
    loss = worker.train_step(0)
    worker.finish_training()
    target = folder / f"trained {stage}"
    target.mkdir(exist_ok=True)
    worker.communicator.barrier()
    worker.export(str(target), plan.model("resnet"), SaveConfig())
    return {"loss": loss, "folder": target, "scores": worker.score(np.arange(NUM_RECORDS), 4)}
