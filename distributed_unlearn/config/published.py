"""Published methods by their own names: a first-order optimiser with the objective that the name stands for."""

from typing import Literal

from pydantic import Field

from distributed_unlearn.config.methods import FirstOrderConfig, RoleDraws
from distributed_unlearn.config.objective import ObjectiveName


class NamedObjectiveConfig(FirstOrderConfig):
    """What the methods have whose name says what is minimised: AdamW on it, `objective.name` may stay away."""

    @property
    def objective_name(self) -> ObjectiveName:
        """What `objective.name` has to be."""
        raise NotImplementedError


class PublishedConfig(NamedObjectiveConfig):
    """AdamW on the objective of the same name; `gradient_descent` is AdamW on the retain loss, plain fine-tuning."""

    method: Literal[
        "gradient_descent", "gradient_ascent", "graddiff", "random_labels", "npo", "simnpo", "undial", "delete"
    ]

    @property
    def objective_name(self) -> ObjectiveName:
        """What `objective.name` has to be."""
        return "retain" if self.method == "gradient_descent" else self.method


class ScrubConfig(NamedObjectiveConfig):
    """SCRUB (Kurmanji et al. 2023): descents on retain records and ascents on forget records take turns.

    A cycle is `retain_steps` descents, then `forget_steps` ascents; after `forget_cycles` cycles all steps are
    descents, which repair what the ascents broke. A step draws its whole minibatch from one of the two sets.
    """

    method: Literal["scrub"]
    retain_steps: int = Field(default=2, ge=1)
    """Descents of a cycle. They come first: at the teacher's own weights the gradient of the ascent is exactly zero."""
    forget_steps: int = Field(default=1, ge=1)
    """Ascents of a cycle."""
    forget_cycles: int = Field(default=6, ge=1)
    """Cycles with ascents."""

    @property
    def objective_name(self) -> ObjectiveName:
        """What `objective.name` has to be."""
        return "scrub"

    def draws_at(self, step_index: int) -> RoleDraws:
        """Forget records in an ascent, retain records in a descent: each time the next minibatch of that role."""
        cycle, position = divmod(step_index, self.retain_steps + self.forget_steps)
        ascents_before = self.forget_steps * min(cycle, self.forget_cycles)
        if cycle < self.forget_cycles and position >= self.retain_steps:
            return RoleDraws(ascents_before + position - self.retain_steps, None)
        return RoleDraws(None, step_index - ascents_before)


class RmuConfig(NamedObjectiveConfig):
    """RMU (Li et al. 2024): a layer's hidden states of forget records are steered to a random vector.

    Published with `model.trainable` at the last matrix of each MLP in this layer and the two below it, and
    `objective.retain_weight` from 100 to 1200; neither is set by the method.
    """

    method: Literal["rmu"]
    layer: int | None = Field(default=None, ge=0)
    """From 0, the layer whose output is steered. null: a quarter of the way up, 7 of 32 as published for Zephyr-7B."""

    @property
    def objective_name(self) -> ObjectiveName:
        """What `objective.name` has to be."""
        return "rmu"

    def layer_of(self, num_layers: int) -> int:
        """The layer, of a model with so many of them."""
        return max(num_layers // 4 - 1, 0) if self.layer is None else self.layer
