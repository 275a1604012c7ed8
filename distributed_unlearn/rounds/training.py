"""A training run on a worker group: fine-tuning, or the retrained reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_unlearn.config import SaveConfig
from distributed_unlearn.files import complete_folder
from distributed_unlearn.provenance import Mark, hash_folder
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.messages import TrainingSpec


@dataclass(frozen=True, eq=False)
class TrainingTask:
    """What to train on and how."""

    spec: TrainingSpec
    destination: Path
    save: SaveConfig
    overwrite: bool
    on_start: Callable[[int], None]
    """Called with the number of steps."""
    on_step: Callable[[int, float], None]
    """Called with step and loss."""


def run_training(workers: Workers, task: TrainingTask) -> list[float]:
    """Train and leave the trained model open on the workers; `write_trained` writes it.

    Returns:
        The loss of every step, nats per token of the global minibatch.
    """
    plan = workers.begin_training(task.spec)
    task.on_start(plan.num_steps)
    losses = []
    for step in range(plan.num_steps):
        loss = workers.train_step(step)
        losses.append(loss)
        task.on_step(step, loss)
    workers.finish_training()
    return losses


def write_trained(
    workers: Workers, task: TrainingTask, papers: Sequence[Path] = (), mark: Mark | None = None
) -> dict[str, str]:
    """Write the trained model to `task.destination`.

    Args:
        workers: Workers on which `run_training` has just ended.
        task: As given to it.
        papers: What tells of the checkpoint that is replaced, see `complete_folder`.
        mark: What the checkpoint says of itself.

    Returns:
        The hashes of what was written.
    """
    with complete_folder(task.destination, task.overwrite, papers) as staging:
        workers.export(str(staging.resolve()), task.spec.model, task.save)
        if mark is not None:
            mark.write(staging)
        return hash_folder(staging)
