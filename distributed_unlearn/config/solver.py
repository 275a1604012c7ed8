"""The solver section of a job: the union of all methods, tagged by `solver.method`."""

from typing import Annotated, Any, get_args

from pydantic import Discriminator, Tag

from distributed_unlearn.config.dampening import SsdConfig
from distributed_unlearn.config.methods import (
    AdamWConfig,
    CureNewtonConfig,
    DampedNewtonConfig,
    PinvNewtonConfig,
    SCureNewtonConfig,
    SgdConfig,
)
from distributed_unlearn.config.published import PublishedConfig, RmuConfig, ScrubConfig
from distributed_unlearn.config.retraining import RetrainConfig

SteppingConfig = (
    SCureNewtonConfig
    | CureNewtonConfig
    | DampedNewtonConfig
    | PinvNewtonConfig
    | AdamWConfig
    | SgdConfig
    | PublishedConfig
    | ScrubConfig
    | RmuConfig
)
"""The methods that take steps on an objective until a rule ends them."""

_MEMBERS: tuple[type, ...] = (*get_args(SteppingConfig), RetrainConfig, SsdConfig)


def method_names(kind: type) -> tuple[str, ...]:
    """What `solver.method` may be for a member of the union."""
    return get_args(kind.model_fields["method"].annotation)  # type: ignore[attr-defined]


def all_methods() -> tuple[str, ...]:
    """Every value of `solver.method`."""
    return tuple(name for kind in _MEMBERS for name in method_names(kind))


def stepping_methods() -> tuple[str, ...]:
    """The values of `solver.method` that take steps on an objective."""
    return tuple(name for kind in get_args(SteppingConfig) for name in method_names(kind))


def methods_with(key: str) -> tuple[str, ...]:
    """The methods that have a setting of this name."""
    return tuple(
        name
        for kind in _MEMBERS
        if key in kind.model_fields  # type: ignore[attr-defined]
        for name in method_names(kind)
    )


def _member(value: Any) -> str | None:  # `Any`: whatever stands in the job file
    """The tag of the union, the first name of its member; a solver section without a method is scurenewton's."""
    found = value.get("method", "scurenewton") if isinstance(value, dict) else getattr(value, "method", None)
    return next((method_names(kind)[0] for kind in _MEMBERS if found in method_names(kind)), None)


SolverConfig = Annotated[
    Annotated[SCureNewtonConfig, Tag("scurenewton")]
    | Annotated[CureNewtonConfig, Tag("curenewton")]
    | Annotated[DampedNewtonConfig, Tag("damped_newton")]
    | Annotated[PinvNewtonConfig, Tag("pinv_newton")]
    | Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[SgdConfig, Tag("sgd")]
    | Annotated[PublishedConfig, Tag("gradient_descent")]
    | Annotated[ScrubConfig, Tag("scrub")]
    | Annotated[RmuConfig, Tag("rmu")]
    | Annotated[RetrainConfig, Tag("retrain")]
    | Annotated[SsdConfig, Tag("ssd")],
    Discriminator(
        _member,
        custom_error_type="unknown_method",
        custom_error_message="Input should be a known solver.method: " + ", ".join(all_methods()),
    ),
]
"""The solver section of a job: `method` says which of these it is."""
