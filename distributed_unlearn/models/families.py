"""Which family opens a model, by `model.task`."""

from typing import assert_never

from distributed_unlearn.config import ModelTask
from distributed_unlearn.models.causal_lm import CausalLM
from distributed_unlearn.models.classifier import ImageClassifier, SequenceClassifier
from distributed_unlearn.models.family import ModelFamily


def family_of(task: ModelTask) -> ModelFamily:
    """The family of `model.task`."""
    match task:
        case "causal_lm":
            return CausalLM()
        case "sequence_classification":
            return SequenceClassifier()
        case "image_classification":
            return ImageClassifier()
        case _:
            assert_never(task)
