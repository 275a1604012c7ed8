"""One job file: its sections, and what they must agree on."""

from typing import Any

from pydantic import model_validator

from distributed_unlearn.config.agreement import require_records_of_task
from distributed_unlearn.config.base import PathText, StrictModel
from distributed_unlearn.config.methods import BaseSolverConfig, SCureNewtonConfig
from distributed_unlearn.config.objective import ObjectiveConfig
from distributed_unlearn.config.published import NamedObjectiveConfig, PublishedConfig, RmuConfig, ScrubConfig
from distributed_unlearn.config.retraining import RetrainConfig
from distributed_unlearn.config.sections import (
    ClusterConfig,
    CurvatureConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SaveConfig,
    SelectionConfig,
    TrainConfig,
)
from distributed_unlearn.config.solver import SolverConfig, method_names


class JobConfig(StrictModel):
    """One job file."""

    model: ModelConfig
    data: DataConfig
    forget: SelectionConfig | None = None
    rounds: tuple[SelectionConfig, ...] | None = None
    holdout: SelectionConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    solver: SolverConfig = SCureNewtonConfig()
    curvature: CurvatureConfig = CurvatureConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    save: SaveConfig = SaveConfig()
    train: TrainConfig | None = None
    retrained: PathText | None = None
    """Checkpoint of a retrained reference; with it the evaluation reports the Tug-of-War."""
    output: PathText
    overwrite: bool = False
    resume: bool = False
    """Go on from the last state that an interrupted run of this job saved in `output`; without one, start anew."""

    @model_validator(mode="before")
    @classmethod
    def _objective_of_the_method(cls, tree: Any) -> Any:
        """Where the job names no objective, that of a method which is named after one."""
        solver = tree.get("solver") if isinstance(tree, dict) else None
        objective = tree.get("objective", {}) if isinstance(tree, dict) else None
        if not isinstance(solver, dict) or not isinstance(objective, dict) or "name" in objective:
            return tree
        method = solver.get("method")
        for kind in (PublishedConfig, ScrubConfig, RmuConfig):
            if method in method_names(kind):
                name = kind.model_construct(method=method).objective_name
                return {**tree, "objective": {**objective, "name": name}}
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> "JobConfig":
        require_records_of_task(self.model, self.data, (self.forget, self.holdout, *(self.rounds or ())))
        self._require_objective_of_method()
        if self.forget is not None and self.rounds is not None:
            raise ValueError("both forget and rounds are given; a single round is `forget`, several are `rounds`")
        if self.rounds is not None and not self.rounds:
            raise ValueError("rounds is empty; give at least one selection or null")
        for selection in (self.forget, *(self.rounds or ())):
            if selection is not None and selection.path is not None:
                raise ValueError("forget selects among the training records; path is for holdout only")
        if self.train is not None and self.train.exclude_forget and not self.forget_rounds:
            raise ValueError("train.exclude_forget without forget or rounds leaves nothing out; name what to leave out")
        if self.unlearns and self.objective.uses_base_model and self.data.base_model is None:
            raise ValueError(
                "objective.target_from base_model without data.base_model; name the checkpoint before fine-tuning, or "
                "take the targets from a holdout set"
            )
        if self.train is not None and self.resume:
            raise ValueError("resume is for rounds; a training that was interrupted starts anew: remove resume")
        if self.unlearns and self._needs_holdout and self.holdout is None:
            raise ValueError(
                f"objective {self.objective.name} and solver.stop.forget_matches_holdout need a holdout selection; "
                "name records that were never trained on, or choose another objective and turn the stop off"
            )
        if self.trains and self.cluster.gpus_per_worker < 1 and self.cluster.use_gpu != "never":
            raise ValueError("training needs a whole GPU for every worker; set cluster.gpus_per_worker to 1")
        return self

    def _require_objective_of_method(self) -> None:
        solver, objective = self.solver, self.objective
        if not self.unlearns:
            return
        if not isinstance(solver, BaseSolverConfig):
            if objective != ObjectiveConfig():
                raise ValueError(f"solver.method {solver.method} has no objective; remove it")
            if isinstance(solver, RetrainConfig) and self.data.base_model is None:
                raise ValueError(
                    "solver.method retrain without data.base_model; name the checkpoint before fine-tuning, from which "
                    "the retrained model starts"
                )
        elif isinstance(solver, NamedObjectiveConfig) and objective.name != solver.objective_name:
            raise ValueError(
                f"solver.method {solver.method} minimises the objective {solver.objective_name}, not "
                f"{objective.name}; remove objective.name, or take solver.method adamw with an objective of your choice"
            )
        elif objective.name == "scrub" and not isinstance(solver, ScrubConfig):
            raise ValueError("objective scrub takes turns that only solver.method scrub takes; choose that method")
        elif objective.name == "rmu" and not isinstance(solver, RmuConfig):
            raise ValueError("objective rmu looks at a layer that only solver.method rmu names; choose that method")
        if isinstance(solver, RmuConfig) and self.model.task != "causal_lm":
            raise ValueError(
                f"solver.method rmu steers hidden states of a causal language model, and model.task is "
                f"{self.model.task}; choose another method"
            )

    @property
    def _needs_holdout(self) -> bool:
        solver = self.solver
        if not isinstance(solver, BaseSolverConfig):
            return False
        return self.objective.uses_holdout or solver.stop.forget_matches_holdout

    @property
    def trains(self) -> bool:
        """Whether DeepSpeed trains a model: a training job, or the retrained reference as a method."""
        return self.train is not None or (self.unlearns and isinstance(self.solver, RetrainConfig))

    @property
    def unlearns(self) -> bool:
        """True when the job names something to forget and is not a training job."""
        return self.train is None and (self.forget is not None or self.rounds is not None)

    @property
    def forget_rounds(self) -> tuple[SelectionConfig, ...]:
        """The forget selection of every round, in order; one entry for a job with `forget`."""
        if self.rounds is not None:
            return self.rounds
        return () if self.forget is None else (self.forget,)
