"""From the solver section of a job to the method that takes its steps."""

from dataclasses import fields
from typing import Protocol, TypeVar

from distributed_unlearn.config import (
    AdamWConfig,
    CureNewtonConfig,
    DampedNewtonConfig,
    PinvNewtonConfig,
    PublishedConfig,
    RmuConfig,
    ScrubConfig,
    SCureNewtonConfig,
    SgdConfig,
    SteppingConfig,
)
from distributed_unlearn.records import StepRecord
from distributed_unlearn.solvers.inner.first_order import AdamWSpec, SgdSpec
from distributed_unlearn.solvers.methods.curenewton import CureNewton, CureNewtonSettings
from distributed_unlearn.solvers.methods.damped_newton import DampedNewton, DampedNewtonSettings
from distributed_unlearn.solvers.methods.first_order import FirstOrder
from distributed_unlearn.solvers.methods.pinv_newton import PinvNewton, PinvNewtonSettings
from distributed_unlearn.solvers.methods.scurenewton import SCureNewton, SCureNewtonSettings
from distributed_unlearn.solvers.protocols import StepOracle

Settings = TypeVar(
    "Settings", SCureNewtonSettings, CureNewtonSettings, DampedNewtonSettings, PinvNewtonSettings, AdamWSpec, SgdSpec
)


class OuterSolver(Protocol):
    """Something that takes outer steps."""

    def step(self, step_index: int) -> StepRecord:
        """Take one step."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What later steps need of earlier ones at the driver; the oracle has its own."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from another one's `state_dict`."""
        ...


def _settings(kind: type[Settings], config: SteppingConfig) -> Settings:
    """The job's values for every field of `kind` that the job has."""
    return kind(**{f.name: getattr(config, f.name) for f in fields(kind) if hasattr(config, f.name)})


def build_solver(oracle: StepOracle, config: SteppingConfig) -> OuterSolver:
    """The method of `solver.method`, ready for its first step."""
    match config:
        case SCureNewtonConfig():
            return SCureNewton(oracle, _settings(SCureNewtonSettings, config))
        case CureNewtonConfig():
            return CureNewton(oracle, _settings(CureNewtonSettings, config))
        case DampedNewtonConfig():
            return DampedNewton(oracle, _settings(DampedNewtonSettings, config))
        case PinvNewtonConfig():
            return PinvNewton(oracle, _settings(PinvNewtonSettings, config))
        case AdamWConfig() | PublishedConfig() | ScrubConfig() | RmuConfig():
            return FirstOrder(oracle, _settings(AdamWSpec, config), config.learning_rate)
        case SgdConfig():
            return FirstOrder(oracle, _settings(SgdSpec, config), config.learning_rate)
