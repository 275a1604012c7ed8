"""Which family opens a model, by `model.task`."""

from typing import assert_never

from distributed_unlearn.config import ModelTask
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.models.causal_lm import CausalLM
from distributed_unlearn.models.family import ModelFamily


def family_of(task: ModelTask) -> ModelFamily:
    """The family of `model.task`.

    Raises:
        ConfigError: a task without a family.
    """
    match task:
        case "causal_lm":
            return CausalLM()
        case "sequence_classification" | "image_classification":
            raise ConfigError(f"model.task {task}, which is not opened yet", "causal_lm", "choose a causal LM")
        case _:
            assert_never(task)
