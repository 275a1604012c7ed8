"""Which parameters of a model a job changes."""

from torch import nn

from distributed_unlearn.curvature.segments import trainable_names
from distributed_unlearn.models.adapters import InsertedAdapter
from distributed_unlearn.models.family import ModelFamily


def trainable_parameters(
    model: nn.Module, family: ModelFamily, patterns: str | tuple[str, ...], adapter: InsertedAdapter | None
) -> frozenset[str]:
    """Qualified names of what `model.trainable` chooses: from the adapter where there is one; never what is idle.

    Raises:
        ModelError: a pattern that matches nothing of this.
    """
    among = frozenset(name for name, _ in model.named_parameters()) if adapter is None else adapter.names
    return trainable_names(model, patterns, among - family.idle(model))
