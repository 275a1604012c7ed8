"""What driver and workers tell each other. Light: importing this loads neither DeepSpeed nor a process group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distributed_unlearn.config import CurvatureConfig, ModelConfig, ObjectiveConfig, SteppingConfig, TrainingSettings
from distributed_unlearn.objectives.constants import RoundConstants

Indices = NDArray[np.int64]
ArchitectureSettings = Mapping[str, int | float | bool | str | None]
"""Settings of a model that is made from nothing, as its configuration class names them."""


@dataclass(frozen=True, eq=False)
class RoundSpec:
    """What the driver tells every rank about a round."""

    round_index: int
    forget: Indices
    retain: Indices
    objective: ObjectiveConfig
    solver: SteppingConfig
    curvature: CurvatureConfig
    holdout_loss: float | None
    constants: RoundConstants
    """What the objective needs to know of predictions at the round's start."""


@dataclass(frozen=True, eq=False)
class RecordScores:
    """Teacher-forced scores of records, aligned with `indices`."""

    indices: Indices
    nll: NDArray[np.float64]
    """Sum over answer tokens, nats."""
    num_tokens: Indices
    num_correct: Indices


@dataclass(frozen=True)
class ModelFacts:
    """What the driver needs to know of an opened model."""

    num_parameters: int
    num_trainable: int
    num_segments: int
    segment_fallback: str | None
    context_length: int | None
    """None where the model has none, or no limit."""
    vocab_size: int | None
    """None where records are not tokens."""
    checkpoint_dtype: str
    num_batch_norms: int = 0
    """Layers of batch normalisation; all use their running statistics, which nothing here changes."""


@dataclass(frozen=True, eq=False)
class TrainingSpec:
    """What the driver tells every rank about a training run."""

    model: ModelConfig
    train: TrainingSettings
    indices: Indices
    """Records to train on."""
    zero_stage: int
    micro_batch_size: int
    seed: int


@dataclass(frozen=True)
class TrainingPlan:
    """Sizes of a training run, the same on every rank."""

    num_steps: int
    batch_size: int
    accumulation_steps: int
    micro_batch_size: int
    left_out: tuple[str, ...] = ()
    """Dropout and the like that the model's configuration asks for and this training does without: `name rate`."""


@dataclass(frozen=True)
class DampeningSpec:
    """How weights are dampened, once all importances are there."""

    selection_weighting: float
    dampening_constant: float
    num_forget: int
    """Records whose squared gradients were added."""
    num_sampled: int
    """The same of the retain set."""
    num_retain: int
    """Records of the whole retain set, for which those stand."""


@dataclass(frozen=True)
class Dampened:
    """What a dampening did."""

    num_weights: int
    """How many weights were dampened."""
    mean_reduction: float | None
    """By which share of itself such a weight shrank, on average; None where there is none."""


@dataclass(frozen=True)
class CurvatureCheck:
    """What `check curvature` compares."""

    batch_size: int = 4
    sequence_length: int = 32
    seed: int = 0
    product: Literal["hessian", "gauss_newton"] = "hessian"
    mode: Literal["cached", "recompute"] = "recompute"
    reference: Literal["auto", "double_backward", "central_difference"] = "auto"


@dataclass(frozen=True)
class CurvatureReport:
    """Relative errors `||ours - reference|| / ||reference||` over all trainable parameters."""

    loss_relative_error: float
    gradient_relative_error: float
    hvp_relative_error: float
    symmetry_error: float
    """`|u'Hv - v'Hu| / (||u|| ||Hv||)` for two random directions."""
    segments: int
    mode: str
    product: str
    reference: str
    num_parameters: int
    world_size: int
    frozen_rows: int
    """Embedding rows held fixed because they are `padding_idx`."""
    gradient_seconds: float
    product_seconds: float
    """One product; in recompute mode with everything recomputed, in cached mode after the gradient."""
    elements_moved_per_parameter: float
    """Elements that collectives delivered to a rank for the measured product, per trainable parameter."""
