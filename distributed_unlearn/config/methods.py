"""How the objective is minimised, and when a round ends."""

from typing import Literal

from pydantic import Field, model_validator

from distributed_unlearn.config.base import StrictModel


class StopConfig(StrictModel):
    """When a round ends before `max_steps`."""

    forget_matches_holdout: bool = True
    """Stop once the forget set is as hard as the holdout set and the retain loss is back where it was."""
    forget_tolerance_nats: float = Field(default=0.15, gt=0.0)
    """Allowed mean distance between a forget record's mean loss and the holdout loss, nats per token."""
    retain_tolerance_nats: float = Field(default=0.05, gt=0.0)
    """Allowed rise of the loss on a fixed sample of the retain set since the round began, nats per token."""
    patience: int = Field(default=2, ge=1)
    """Consecutive checks for which both must hold."""
    check_every_steps: int = Field(default=1, ge=1)
    """Steps between two checks; each scores the forget set once."""
    max_seconds: float | None = Field(default=None, gt=0.0)


class SolverConfig(StrictModel):
    """How the objective is minimised."""

    method: Literal["scurenewton", "adamw", "sgd"] = "scurenewton"
    inner: Literal["krylov", "gradient_descent"] = "krylov"
    max_krylov_steps: int = Field(default=3, ge=1, le=200)
    krylov_tolerance: float = Field(default=1e-2, ge=0.0)
    """Stop growing the Krylov space when the cubic model's residual over ||g|| is below this."""
    inner_steps: int = Field(default=10, ge=1)
    """gradient_descent: inner steps (5 to 10 in the paper)."""
    inner_learning_rate: float = Field(default=0.01, gt=0.0)
    """gradient_descent: eta of the paper."""
    perturbation: float = Field(default=1e-3, ge=0.0)
    """gradient_descent: sigma, the relative size of the random gradient perturbation against the hard case."""
    cubic_coefficient: float = Field(default=100.0, gt=0.0)
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
    gradient_batch: int = Field(default=48, ge=1)
    """Records per gradient minibatch; half forget, half retain, at least one of each, if the objective uses both."""
    curvature_batch: int = Field(default=16, ge=1)
    """Records per curvature minibatch, the head of the gradient minibatch."""
    max_steps: int = Field(default=30, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0.0, le=1e38)
    """adamw, sgd."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    seed: int = Field(default=0, ge=0)
    stop: StopConfig = StopConfig()

    @model_validator(mode="after")
    def _batches_fit(self) -> "SolverConfig":
        if self.method == "scurenewton" and self.curvature_batch > self.gradient_batch:
            raise ValueError("curvature_batch is larger than gradient_batch, of which it is the head; lower it")
        if self.very_good_threshold < self.acceptance_threshold:
            raise ValueError("very_good_threshold is below acceptance_threshold; raise it")
        return self
