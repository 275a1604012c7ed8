"""How the objective is minimised, and when a round ends: one model a method; `config/solver.py` has their union."""

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from distributed_unlearn.config.base import StrictModel


class StopConfig(StrictModel):
    """When a round ends before `max_steps`."""

    forget_matches_holdout: bool = True
    """Stop once the forget set is as hard as the holdout set and the retain loss is back where it was."""
    forget_tolerance_nats: float = Field(default=0.15, gt=0.0)
    """Allowed mean distance between a forget record's mean loss and the holdout loss, nats per token."""
    level: float = Field(default=0.05, gt=0.0, lt=1.0)
    """token_matched: level of the two-sample test that is to find no difference between the log-odds of forget and of
    holdout tokens; it takes the place of `forget_tolerance_nats`."""
    retain_tolerance_nats: float = Field(default=0.05, gt=0.0)
    """Allowed rise of the loss on a fixed sample of the retain set since the round began, nats per token."""
    patience: int = Field(default=2, ge=1)
    """Consecutive checks for which both must hold."""
    check_every_steps: int = Field(default=1, ge=1)
    """Steps between two checks; each scores the forget set once."""
    max_seconds: float | None = Field(default=None, gt=0.0)


class RoleDraws(NamedTuple):
    """Which minibatch of each role a step is about, from 0; None: the step leaves that role out."""

    forget: int | None
    retain: int | None


class BaseSolverConfig(StrictModel):
    """What every method has that takes steps on an objective."""

    gradient_batch: int = Field(default=48, ge=1)
    """Records per gradient minibatch; half forget, half retain, at least one of each, if the objective uses both."""
    max_steps: int = Field(default=30, ge=1)
    seed: int = Field(default=0, ge=0)
    stop: StopConfig = StopConfig()

    def draws_at(self, step_index: int) -> RoleDraws:
        """Which minibatches the step draws: of both roles the next one."""
        return RoleDraws(step_index, step_index)


class SecondOrderConfig(BaseSolverConfig):
    """What every method with curvature has."""

    curvature_batch: int = Field(default=8, ge=1)
    """Records per curvature minibatch, the head of the gradient minibatch."""

    @model_validator(mode="after")
    def _batches_fit(self) -> "SecondOrderConfig":
        if self.curvature_batch > self.gradient_batch:
            raise ValueError("curvature_batch is larger than gradient_batch, of which it is the head; lower it")
        return self


class CubicConfig(SecondOrderConfig):
    """What the cubic methods have."""

    cubic_coefficient: float = Field(default=10.0, gt=0.0)
    """M of the cubic model (L in the paper), the first value when `adaptive`."""
    adaptive: bool = True
    """Accept or reject steps and adapt M (Cartis, Gould, Toint 2011). false: the paper's fixed coefficient."""
    adaptation: Literal["interpolated", "factor"] = "interpolated"
    """How M moves: by the model error that the trial showed, or by the two factors alone."""
    acceptance_threshold: float = Field(default=0.1, gt=0.0, lt=1.0)
    very_good_threshold: float = Field(default=0.7, gt=0.0, le=1.0)
    increase_factor: float = Field(default=4.0, gt=1.0)
    decrease_factor: float = Field(default=3.0, ge=1.0)
    max_rejections: int = Field(default=8, ge=0)

    @model_validator(mode="after")
    def _thresholds_fit(self) -> "CubicConfig":
        if self.very_good_threshold < self.acceptance_threshold:
            raise ValueError("very_good_threshold is below acceptance_threshold; raise it")
        return self


class SCureNewtonConfig(CubicConfig):
    """Stochastic cubic steps from products alone."""

    method: Literal["scurenewton"] = "scurenewton"
    inner: Literal["krylov", "subspace", "gradient_descent"] = "subspace"
    """Where the cubic model is minimised: on a Krylov space, on the span of the (preconditioned) gradient and the last
    accepted steps, or over all weights by gradient descent as in the paper."""
    metric: Literal["identity", "adam"] = "adam"
    """The norm in which a step is short: Euclidean as in the paper, or scaled by Adam's second moment. With `adam`,
    alpha, gamma, M and the Ritz values are those of the scaled problem."""
    max_krylov_steps: int = Field(default=3, ge=1, le=200)
    """krylov: exact products a step, at most."""
    krylov_tolerance: float = Field(default=1e-2, ge=0.0)
    """Stop growing the Krylov space when the cubic model's residual over ||g|| is below this."""
    subspace_steps: int = Field(default=1, ge=0, le=10)
    """subspace: how many of the last accepted steps span it, beside the gradient; one exact product each."""
    subspace_gradient: Literal["whole", "by_role"] = "whole"
    """subspace: the gradient as one direction, or its forget part and its retain part as two, which the cubic model
    scales apart; one exact product each."""
    inner_steps: int = Field(default=10, ge=1)
    """gradient_descent: inner steps (5 to 10 in the paper)."""
    inner_learning_rate: float = Field(default=0.01, gt=0.0)
    """gradient_descent: eta of the paper."""
    perturbation: float = Field(default=1e-3, ge=0.0)
    """gradient_descent: sigma, the relative size of the random gradient perturbation against the hard case."""


class CureNewtonConfig(CubicConfig):
    """Cubic steps with the Hessian written down, for models of up to a few thousand trainable parameters."""

    method: Literal["curenewton"]
    adaptive: bool = False
    """false: the paper's fixed coefficient, every finite step is kept."""
    max_parameters: int = Field(default=5000, ge=1)
    """More trainable parameters than this are refused: rank 0 holds the matrix, 32 n^2 bytes at its peak."""


class DampedNewtonConfig(SecondOrderConfig):
    """Newton steps with a fixed damping, by conjugate gradients; a baseline of the paper, without step control."""

    method: Literal["damped_newton"]
    damping: float = Field(default=1e-2, gt=0.0)
    """gamma of (H + gamma I) Delta = -g."""
    max_cg_steps: int = Field(default=50, ge=1)
    """Exact products a step, at most."""
    cg_tolerance: float = Field(default=1e-3, ge=0.0)
    """Largest residual over ||g|| that counts as solved."""


class PinvNewtonConfig(SecondOrderConfig):
    """Newton steps with the pseudo-inverse of an explicit Hessian; a baseline of the paper, without step control."""

    method: Literal["pinv_newton"]
    cutoff: float = Field(default=1e-6, ge=0.0, lt=1.0)
    """Eigenvalues of at most this share of the largest (in size) count as zero."""
    max_parameters: int = Field(default=5000, ge=1)
    """More trainable parameters than this are refused: rank 0 holds the matrix, 32 n^2 bytes at its peak."""


class FirstOrderConfig(BaseSolverConfig):
    """What the first-order methods have."""

    learning_rate: float = Field(default=2e-4, gt=0.0, le=1e38)
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Of matrices; vectors (norms, biases) and frozen rows are spared."""


class AdamWConfig(FirstOrderConfig):
    """AdamW on the same objective."""

    method: Literal["adamw"]


class SgdConfig(FirstOrderConfig):
    """SGD on the same objective."""

    method: Literal["sgd"]
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
