"""RMU: hidden states of forget records are steered to a random vector, those of retain records stay where they were."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_unlearn.objectives.predictions import MinibatchTotals, Predictions
from distributed_unlearn.objectives.terms import Needs


def control_vector(size: int, seed: int) -> Tensor:
    """`u`, a unit vector whose entries are drawn uniformly from [0, 1) before it is normalised: float64 [size]."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(size)
    drawn = torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) / 2.0**53)
    return drawn / drawn.norm()


@dataclass(frozen=True)
class SteeringObjective:
    """Representation misdirection (RMU; Li et al. 2024, arXiv 2403.03218); implements `Objective`.

    What it is given as logits are hidden states `h` [N, D], a block's output where the model predicts; as start logits
    those at the round's start, `h0`:

        forget_weight * mean over forget predictions of |h - c u|^2 / D
        + retain_weight * mean over retain predictions of |h - h0|^2 / D.

    The authors' code divides by D as well, takes every token of a text and a retain weight of 100 to 1200; labels are
    not looked at.
    """

    retain_weight: float
    forget_weight: float
    coefficient: float
    """c, the length that forget records' states are to have."""
    seed: int
    """Of u."""

    @property
    def forget_needs(self) -> Needs | None:
        """Nothing beside the states."""
        return Needs() if self.forget_weight > 0 else None

    @property
    def retain_needs(self) -> Needs | None:
        """The states at the round's start."""
        return Needs(start_logits=True) if self.retain_weight > 0 else None

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share."""
        parts = [predictions.wide.new_zeros(())]
        if self.forget_needs is not None:
            parts.append(self.forget_weight * self._steered(predictions, totals))
        if self.retain_needs is not None:
            parts.append(self.retain_weight * self._kept(predictions, totals))
        return torch.stack(parts).sum()

    @torch.no_grad()
    def terms(self, predictions: Predictions, totals: MinibatchTotals) -> dict[str, Tensor]:
        """Shares of `forget_term` and `retain_term`, unweighted, where they are in use and have tokens; no losses."""
        parts: dict[str, Tensor] = {}
        if totals.num_forget_tokens > 0 and self.forget_needs is not None:
            parts["forget_term"] = self._steered(predictions, totals)
        if totals.num_retain_tokens > 0 and self.retain_needs is not None:
            parts["retain_term"] = self._kept(predictions, totals)
        return {name: value.detach() for name, value in parts.items()}

    def _steered(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        states = predictions.wide[predictions.of_role(is_forget=True)]
        target = self.coefficient * control_vector(states.shape[1], self.seed).to(states)
        return (states - target).square().mean(1).sum() / max(totals.num_forget_tokens, 1)

    def _kept(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        assert predictions.start_logits is not None, "hidden states at the start were not computed"
        chosen, states = predictions.of_role(is_forget=False), predictions.wide
        moved = states[chosen] - predictions.start_logits.detach().to(states.dtype)[chosen]
        return moved.square().mean(1).sum() / max(totals.num_retain_tokens, 1)
