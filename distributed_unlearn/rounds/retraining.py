"""A round of the method `retrain`: a model that never saw what is to be forgotten takes the place of the open one."""

import logging
import time

import numpy as np

from distributed_unlearn.config import JobConfig, ModelConfig, RetrainConfig, TrainingSettings
from distributed_unlearn.models.base_of_adapter import model_to_retrain
from distributed_unlearn.records import RoundRecord
from distributed_unlearn.rounds.evaluate import Scores
from distributed_unlearn.rounds.preparation import Session
from distributed_unlearn.rounds.round import Changed, RoundTask, close_round, open_round
from distributed_unlearn.workers.messages import TrainingPlan, TrainingSpec

_LOG = logging.getLogger(__name__)


def training_spec(job: JobConfig, model: ModelConfig, settings: TrainingSettings, indices: np.ndarray) -> TrainingSpec:
    """A training of `model` on some records, as the job's cluster and solver sections have it."""
    return TrainingSpec(
        model=model,
        train=settings,
        indices=indices,
        zero_stage=settings.stage_in(job.cluster),
        micro_batch_size=job.curvature.micro_batch_size,
        seed=job.solver.seed,
    )


def train_steps(session: Session, plan: TrainingPlan) -> list[float]:
    """Take the steps of a training that has begun; the loss of each, nats per token."""
    if plan.left_out:
        _LOG.warning(
            "the model's configuration asks for %s; training leaves it out, so that its result depends on neither "
            "the number of workers nor the micro-batch",
            ", ".join(plan.left_out),
        )
    losses = []
    with session.events.training(plan.num_steps) as tell:
        for step in range(plan.num_steps):
            loss = session.workers.train_step(step)
            losses.append(loss)
            session.log.log("train", step, {"loss_nats_per_token": loss})
            tell(step, loss)
    return losses


def run_retrained_round(session: Session, task: RoundTask, start: Scores) -> RoundRecord:
    """Train the checkpoint before fine-tuning on the round's retain set and leave the result on the workers.

    Every round starts there again: what is left of round k is what is left without the forget sets of rounds 1 to k.

    Raises:
        ModelError: a checkpoint that cannot be loaded.
        NumericalError: a loss that is not finite.
    """
    job, workers, solver = session.run.job, session.workers, task.solver
    assert isinstance(solver, RetrainConfig) and job.data.base_model is not None
    opening, started = open_round(workers, task, start), time.monotonic()
    model = model_to_retrain(job.model, job.data.base_model)
    plan = workers.begin_retraining(training_spec(session.run.job, model, solver, task.retain))
    losses = train_steps(session, plan)
    workers.finish_retraining()
    reason = f"retrained: {solver.epochs} epoch(s) of {len(task.retain)} retain records, last loss {losses[-1]:.4f}"
    return close_round(workers, task, start, opening, Changed(reason, (), started, len(losses)))
