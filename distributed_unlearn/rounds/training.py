"""A training run on a worker group: fine-tuning, or the retrained reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distributed_unlearn.config import ModelConfig, SaveConfig, TrainConfig
from distributed_unlearn.files import complete_folder
from distributed_unlearn.provenance import hash_folder
from distributed_unlearn.workers.group import WorkerGroup


@dataclass(frozen=True, eq=False)
class TrainingTask:
    """What to train on and how."""

    model: ModelConfig
    train: TrainConfig
    indices: np.ndarray
    zero_stage: int
    micro_batch_size: int
    seed: int
    destination: Path
    save: SaveConfig
    overwrite: bool
    on_start: Callable[[int], None]
    """Called with the number of steps."""
    on_step: Callable[[int, float], None]
    """Called with step and loss."""


def run_training(group: WorkerGroup, task: TrainingTask) -> list[float]:
    """Train and leave the trained model open on the workers; `write_trained` writes it.

    Returns:
        The loss of every step, nats per token of the global minibatch.
    """
    plan = group.call_all(
        "begin_training",
        task.model,
        task.train,
        task.indices,
        task.zero_stage,
        task.micro_batch_size,
        task.seed,
    )[0]
    task.on_start(plan.num_steps)
    losses = []
    for step in range(plan.num_steps):
        loss = group.call_all("train_step", step)[0]
        losses.append(loss)
        task.on_step(step, loss)
    group.call_all("finish_training")
    return losses


def write_trained(group: WorkerGroup, task: TrainingTask, papers: Sequence[Path] = ()) -> dict[str, str]:
    """Write the trained model to `task.destination`.

    Args:
        group: Workers on which `run_training` has just ended.
        task: As given to it.
        papers: What tells of the checkpoint that is replaced, see `complete_folder`.

    Returns:
        The hashes of what was written.
    """
    with complete_folder(task.destination, task.overwrite, papers) as staging:
        group.call_all("export", str(staging.resolve()), task.model, task.save)
        return hash_folder(staging)
