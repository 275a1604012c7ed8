"""The job file as frozen, strict pydantic models. Unknown keys are refused and no value is ever rewritten."""

from distributed_unlearn.config.base import StrictModel
from distributed_unlearn.config.job import JobConfig
from distributed_unlearn.config.load import apply_overrides, load_job, parse_cluster, parse_job
from distributed_unlearn.config.methods import SolverConfig, StopConfig
from distributed_unlearn.config.objective import ObjectiveConfig
from distributed_unlearn.config.sections import (
    ClusterConfig,
    CurvatureConfig,
    DataConfig,
    ErasedConfig,
    EvaluationConfig,
    ModelConfig,
    ModelTask,
    SaveConfig,
    SelectionConfig,
    TrainConfig,
)

__all__ = [
    "ClusterConfig",
    "CurvatureConfig",
    "DataConfig",
    "ErasedConfig",
    "EvaluationConfig",
    "JobConfig",
    "ModelConfig",
    "ModelTask",
    "ObjectiveConfig",
    "SaveConfig",
    "SelectionConfig",
    "SolverConfig",
    "StopConfig",
    "StrictModel",
    "TrainConfig",
    "apply_overrides",
    "load_job",
    "parse_cluster",
    "parse_job",
]
