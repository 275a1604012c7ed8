"""The project's AdamW as an optimiser that DeepSpeed can partition, for training."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distributed_unlearn.curvature.segments import frozen_rows
from distributed_unlearn.engine.decay import RowRange, decays
from distributed_unlearn.solvers.adamw import AdamWConstants, adamw_update

Group = dict[str, Any]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """What is trainable, by how it decays: matrices, vectors, and by itself each matrix with a row that does not.

    A matrix of the last kind is alone in its group, since DeepSpeed lays the members of a group end to end and cuts the
    whole: alone, its parts are known from their length.
    """
    rows = frozen_rows(model)
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    groups: list[Group] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # At stage 3 a parameter's own shape is that of an empty placeholder.
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if not decays(shape):
            vectors.append(parameter)
        elif name in rows:
            spared = RowRange.of(shape, rows[name])
            groups.append({"params": [parameter], "weight_decay": weight_decay, "spared": spared})
        else:
            matrices.append(parameter)
    groups.append({"params": matrices, "weight_decay": weight_decay, "spared": None})
    groups.append({"params": vectors, "weight_decay": 0.0, "spared": None})
    return [group for group in groups if group["params"]]  # DeepSpeed cannot flatten an empty one


class AdamW(torch.optim.Optimizer):
    """`adamw_update` on whole parameters or, as DeepSpeed hands them over, on this rank's flat part of a group.

    Args:
        groups: as `parameter_groups` makes them.
        learning_rate: of all groups, until somebody sets another `lr`.
        rank: which part of a partitioned group is this process's.
    """

    def __init__(self, groups: list[Group], learning_rate: float, rank: int) -> None:
        self._rank, self._constants = rank, AdamWConstants()
        super().__init__(groups, {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, each by its own count of updates."""
        for group in self.param_groups:
            for weights in self._with_gradient(group["params"]):
                state = self.state[weights]
                if not state:
                    state |= {"count": 0, "first": torch.zeros_like(weights), "second": torch.zeros_like(weights)}
                state["count"] += 1
                assert weights.grad is not None
                update = adamw_update(
                    weights.grad,
                    state["first"],
                    state["second"],
                    state["count"],
                    group["lr"],
                    self._decay(weights, group),
                    self._constants,
                )
                weights.add_(update)

    def _with_gradient(self, parameters: Iterable[Tensor]) -> Iterable[Tensor]:
        return (parameter for parameter in parameters if parameter.grad is not None)

    def _decay(self, weights: Tensor, group: Group) -> Tensor | None:
        """`lambda w` where weights decay, a new tensor."""
        if group["weight_decay"] == 0.0:
            return None
        decay = weights * group["weight_decay"]
        if group["spared"] is not None:
            group["spared"].zero_in(decay.view(-1), self._rank)
        return decay
