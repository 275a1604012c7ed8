"""The job file as frozen, strict pydantic models. Unknown keys are refused and no value is ever rewritten."""

from distributed_unlearn.config.base import StrictModel
from distributed_unlearn.config.job import JobConfig
from distributed_unlearn.config.load import apply_overrides, load_job, parse_cluster, parse_job
from distributed_unlearn.config.methods import (
    AdamWConfig,
    BaseSolverConfig,
    CubicConfig,
    CureNewtonConfig,
    DampedNewtonConfig,
    FirstOrderConfig,
    PinvNewtonConfig,
    SCureNewtonConfig,
    SecondOrderConfig,
    SgdConfig,
    SolverConfig,
    StopConfig,
)
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
    "AdamWConfig",
    "BaseSolverConfig",
    "ClusterConfig",
    "CubicConfig",
    "CureNewtonConfig",
    "CurvatureConfig",
    "DampedNewtonConfig",
    "DataConfig",
    "ErasedConfig",
    "EvaluationConfig",
    "FirstOrderConfig",
    "JobConfig",
    "ModelConfig",
    "ModelTask",
    "ObjectiveConfig",
    "PinvNewtonConfig",
    "SCureNewtonConfig",
    "SaveConfig",
    "SecondOrderConfig",
    "SelectionConfig",
    "SgdConfig",
    "SolverConfig",
    "StopConfig",
    "StrictModel",
    "TrainConfig",
    "apply_overrides",
    "load_job",
    "parse_cluster",
    "parse_job",
]
