"""The demo's jobs, as a user would write them: train, retrain, unlearn, and the methods to compare with."""

from dataclasses import dataclass
from pathlib import Path

from distributed_unlearn.config import (
    AdamWConfig,
    ClusterConfig,
    DataConfig,
    JobConfig,
    ModelConfig,
    ObjectiveConfig,
    SolverConfig,
)
from distributed_unlearn.demo.settings import Baseline, DemoSettings

_NEVER = 1 << 30


@dataclass(frozen=True)
class DemoJobs:
    """Jobs over the data and checkpoints in one folder; each has a folder of its own in it."""

    settings: DemoSettings
    cluster: ClusterConfig
    folder: Path

    def checkpoint(self, name: str) -> str:
        """Where the job of this name writes its model."""
        return str((self.folder / name / "checkpoint").resolve())

    def _job(self, name: str, model: str, solver: SolverConfig, objective: ObjectiveConfig) -> JobConfig:
        return JobConfig(
            model=ModelConfig(path=model),
            data=DataConfig(path=str((self.folder / "records.jsonl").resolve())),
            forget=self.settings.forget,
            holdout=self.settings.holdout,
            objective=objective,
            solver=solver,
            curvature=self.settings.curvature,
            cluster=self.cluster,
            output=str((self.folder / name).resolve()),
            overwrite=True,
        )

    def training(self, name: str, exclude_forget: bool) -> JobConfig:
        """Train the initial model on everything but the holdout, or also without what is to be forgotten."""
        job = self._job(name, str((self.folder / "initial").resolve()), self.settings.solver, ObjectiveConfig())
        return job.model_copy(
            update={"train": self.settings.train.model_copy(update={"exclude_forget": exclude_forget})}
        )

    def unlearning(self, name: str) -> JobConfig:
        """The cubic steps, from the original model, compared with the retrained one."""
        job = self._job(name, self.checkpoint("original"), self.settings.solver, ObjectiveConfig())
        return job.model_copy(update={"retrained": self.checkpoint("retrained")})

    def baseline(self, baseline: Baseline, seconds: float) -> JobConfig:
        """A first-order method from the original model for this wall time, or a little more."""
        stop = self.settings.solver.stop.model_copy(
            update={
                "forget_matches_holdout": baseline.is_cubic_objective,
                "check_every_steps": 10,
                "patience": _NEVER,  # the conditions are watched, but only the clock ends the run
                "max_seconds": seconds,
            }
        )
        cubic = self.settings.solver
        solver = AdamWConfig(
            method="adamw",
            gradient_batch=cubic.gradient_batch,
            learning_rate=baseline.learning_rate,
            max_steps=_NEVER,
            seed=cubic.seed,
            stop=stop,
        )
        job = self._job(baseline.folder, self.checkpoint("original"), solver, baseline.objective)
        return job.model_copy(update={"retrained": self.checkpoint("retrained")})
