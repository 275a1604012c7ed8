"""The spectrum of the retain Hessian on workers: of a checkpoint, or at some epochs of a training (Figure 1)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distributed_unlearn.config import JobConfig, ObjectiveConfig, SCureNewtonConfig, StopConfig
from distributed_unlearn.data.prepare import PreparedData, prepare_data
from distributed_unlearn.data.sampling import draw
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.files import write_json
from distributed_unlearn.models.fit import check_checkpoint
from distributed_unlearn.objectives.constants import RoundConstants
from distributed_unlearn.provenance import package_versions
from distributed_unlearn.records import to_json
from distributed_unlearn.records.spectrum import (
    SPECTRUM_FORMAT,
    SPECTRUM_NAME,
    NumericalRank,
    SpectrumPoint,
    SpectrumRecord,
)
from distributed_unlearn.rounds.origin import model_to_open, redacted_config
from distributed_unlearn.rounds.preparation import training_records
from distributed_unlearn.rounds.retraining import training_spec
from distributed_unlearn.solvers.spectrum import Spectrum, exact_spectrum, lanczos_spectrum, numerical_rank
from distributed_unlearn.workers.client import RemoteOracle, Workers
from distributed_unlearn.workers.group import WorkerGroup
from distributed_unlearn.workers.messages import RoundSpec

CUTOFFS = (1e-1, 1e-2, 1e-3, 1e-4)
RESOLVED = 1e-2
"""Below this share of the largest eigenvalue the nodes of a few dozen Lanczos steps say nothing of single ones."""


@dataclass(frozen=True)
class SpectrumSettings:
    """How spectra are measured."""

    epochs: tuple[int, ...] = ()
    """Of the job's training, 0 is the model before it; none: the job's model as it is."""
    max_records: int | None = None
    """Retained records at most, a seeded sample; None: all."""
    exact_up_to: int = 5000
    """All eigenvalues for models of at most so many trainable parameters; stochastic Lanczos quadrature beyond."""
    num_probes: int = 4
    num_steps: int = 40
    """Lanczos steps from each random start, one product each."""


OnPoint = Callable[[SpectrumPoint, int], None]
"""Called with each measured point and the number of trainable parameters."""


def prepare_spectrum(job: JobConfig, settings: SpectrumSettings) -> PreparedData:
    """Everything that can be refused before a weight is loaded.

    Raises:
        ConfigError: epochs without a training, or beyond it.
        DataError, ModelError: see the parts.
    """
    if settings.epochs and job.train is None:
        raise ConfigError("epochs for a job without a train section", "a training job", "give one, or leave them out")
    if job.train is not None and not settings.epochs:
        raise ConfigError("a training job without epochs", "epochs of it", "give --epochs, e.g. --epochs 0,1,5")
    if job.train is not None and not all(0 <= epoch <= job.train.epochs for epoch in settings.epochs):
        raise ConfigError(
            f"epochs {', '.join(map(str, settings.epochs))}", f"0 to {job.train.epochs}", "correct --epochs"
        )
    check_checkpoint(job.model, job.cluster.zero_stage)
    return prepare_data(job.model, job.data, job.forget_rounds, job.holdout)


def measure_spectra(
    group: WorkerGroup, job: JobConfig, data: PreparedData, settings: SpectrumSettings, on_point: OnPoint
) -> SpectrumRecord:
    """The spectrum of the mean loss over the retained records, at every point that is asked for.

    A training is taken up to each epoch anew, with the learning rates of the whole one: it depends on seed and step
    alone, so that this is the model that it passes through, and nothing needs to be kept meanwhile.
    """
    workers = Workers(group)
    workers.set_corpus(data.corpus)
    records = _retained(job, data)
    if settings.max_records is not None:
        records = np.sort(draw(job.solver.seed, 0, 0, "spectrum", records, settings.max_records))
    points: list[SpectrumPoint] = []
    dimension, is_exact = 0, False
    for epoch in settings.epochs or (None,):
        dimension = _open(workers, job, data, epoch)
        is_exact = dimension <= settings.exact_up_to
        started = time.monotonic()
        workers.begin_round(_round(job, records))
        oracle = RemoteOracle(workers.group)
        if is_exact:
            found = exact_spectrum(oracle, settings.exact_up_to)
        else:
            found = lanczos_spectrum(oracle, settings.num_probes, settings.num_steps)
        points.append(_point(found, epoch, dimension, time.monotonic() - started))
        on_point(points[-1], dimension)
    return SpectrumRecord(
        format=SPECTRUM_FORMAT,
        method="exact" if is_exact else "lanczos",
        product=job.curvature.product,
        dimension=dimension,
        num_records=len(records),
        num_probes=0 if is_exact else settings.num_probes,
        config=redacted_config(job),
        versions=package_versions(),
        points=tuple(points),
    )


def write_spectrum(folder: Path, record: SpectrumRecord) -> Path:
    """Write spectrum.json into a folder that exists."""
    write_json(folder / SPECTRUM_NAME, to_json(record))
    return folder / SPECTRUM_NAME


def _retained(job: JobConfig, data: PreparedData) -> np.ndarray:
    if job.train is not None:
        return training_records(job, data)
    rounds = data.partition.forget_rounds
    return data.partition.retain(len(rounds) - 1) if rounds else data.partition.training


def _open(workers: Workers, job: JobConfig, data: PreparedData, epoch: int | None) -> int:
    """Open the model, after so many epochs of the job's training; its number of trainable parameters."""
    model = model_to_open(job.model, data.commit)
    facts = workers.open_model(model, job.model.dtype, job.cluster.zero_stage)
    if not epoch:
        return facts.num_trainable
    assert job.train is not None
    spec = training_spec(job, model, job.train, training_records(job, data))
    plan = workers.begin_retraining(spec)  # which gives the trained model the same trainable parameters
    for step in range(plan.num_steps * epoch // job.train.epochs):
        workers.train_step(step)
    return workers.finish_retraining().num_trainable


def _round(job: JobConfig, records: Sequence[int] | np.ndarray) -> RoundSpec:
    """A round whose every step sees all the records, of which not one step is taken."""
    none = np.empty(0, dtype=np.int64)
    size = len(records)
    return RoundSpec(
        round_index=0,
        forget=none,
        retain=np.asarray(records, dtype=np.int64),
        objective=ObjectiveConfig(name="retain"),
        solver=SCureNewtonConfig(
            gradient_batch=size,
            curvature_batch=size,
            metric="identity",
            seed=job.solver.seed,
            stop=StopConfig(forget_matches_holdout=False),
        ),
        curvature=job.curvature,
        holdout_loss=None,
        constants=RoundConstants.none(),
    )


def _point(found: Spectrum, epoch: int | None, dimension: int, seconds: float) -> SpectrumPoint:
    ranks = []
    for cutoff in (share for share in CUTOFFS if found.num_probes == 0 or share >= RESOLVED):
        rank = numerical_rank(found, dimension, cutoff)
        ranks.append(NumericalRank(cutoff, rank.value, rank.standard_error))
    return SpectrumPoint(
        epoch=epoch,
        loss_nats_per_token=found.loss,
        eigenvalues=found.eigenvalues,
        shares=found.shares,
        num_products=found.num_products,
        ranks=tuple(ranks),
        wall_seconds=seconds,
    )
