"""The job file as frozen, strict pydantic models. Unknown keys are refused and no value is ever rewritten."""

from distributed_unlearn.config.base import StrictModel
from distributed_unlearn.config.dampening import SsdConfig
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
    StopConfig,
)
from distributed_unlearn.config.objective import ObjectiveConfig
from distributed_unlearn.config.published import NamedObjectiveConfig, PublishedConfig, RmuConfig, ScrubConfig
from distributed_unlearn.config.retraining import RetrainConfig
from distributed_unlearn.config.sections import (
    AdapterConfig,
    AdapterFolder,
    ClusterConfig,
    CurvatureConfig,
    DataConfig,
    ErasedConfig,
    EvaluationConfig,
    LoraAdapter,
    ModelConfig,
    ModelTask,
    SaveConfig,
    SelectionConfig,
    TrainConfig,
    TrainingSettings,
)
from distributed_unlearn.config.solver import SolverConfig, SteppingConfig, stepping_methods

__all__ = [
    "AdamWConfig",
    "AdapterConfig",
    "AdapterFolder",
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
    "LoraAdapter",
    "ModelConfig",
    "ModelTask",
    "NamedObjectiveConfig",
    "ObjectiveConfig",
    "PinvNewtonConfig",
    "PublishedConfig",
    "RetrainConfig",
    "RmuConfig",
    "SCureNewtonConfig",
    "SaveConfig",
    "ScrubConfig",
    "SecondOrderConfig",
    "SelectionConfig",
    "SgdConfig",
    "SolverConfig",
    "SsdConfig",
    "SteppingConfig",
    "StopConfig",
    "StrictModel",
    "TrainConfig",
    "TrainingSettings",
    "apply_overrides",
    "load_job",
    "parse_cluster",
    "parse_job",
    "stepping_methods",
]
