"""The metric in which a step is short or long: Adam's second moment as a diagonal scaling of the weights.

With a positive diagonal `P` the cubic model of a step is

    m(Delta) = g'Delta + 1/2 Delta'H Delta + (M/6) ||Delta||_P^3,    ||Delta||_P^2 = Delta' P^-1 Delta.

Let `S = P^(1/2)` and `Delta = S y`. Then `||Delta||_P = ||y||` and `m = (S g)'y + 1/2 y'(S H S)y + (M/6) ||y||^3`: the
ordinary cubic model with gradient `S g` and Hessian `S H S`, which any inner solver minimises. Its conditions
`(S H S + gamma I) y = -S g`, `gamma = (M/2) ||y||`, read `(H + gamma P^-1) Delta = -g` for the weights: gamma is a
damping in the metric, large where gradients are large. So with a metric `alpha = ||Delta||_P`, gamma, and the Ritz
values (of `S H S`, which has the eigenvalues of `P H`) are those of the scaled problem, and the space
`span{S g, ...}` is `span{P g, ...}` for the weights: the preconditioned gradient.
"""

from dataclasses import dataclass

import torch

from distributed_unlearn.solvers.problem import Memory
from distributed_unlearn.solvers.space import VectorSpace

_MOMENT = "metric second moment"


@dataclass(frozen=True)
class AdamMetric:
    """`P = s / (sqrt(v) + floor s)` with `v` Adam's second moment and `s` the root mean square of `sqrt(v)`.

    `v` is the moving average of the minibatch gradients' squares (Kingma and Ba 2015, algorithm 1, without the first
    moment; a factor common to all entries, such as the debiasing, cancels in `P`). `P` has no unit, is
    1 / (1 + floor) where an entry's gradients are of average size and at most `1 / floor` where they vanish: without
    the floor, an entry that hardly ever has a gradient would be moved without limit. The curvature of a loss grows
    like the square of its gradients, and `sqrt(v)` is the compromise that Adam makes; here the Hessian of the scaled
    problem corrects it.
    """

    decay: float = 0.99
    """Weight of the past in the moving average."""
    floor: float = 0.1
    """Added to `sqrt(v)`, as a share of its root mean square."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a decay outside [0, 1) or a floor that is not positive.
        """
        if not (0.0 <= self.decay < 1.0 and self.floor > 0.0):
            raise ValueError(f"got decay {self.decay} and floor {self.floor}; expected [0, 1) and a positive floor")

    def scale(self, space: VectorSpace, gradient: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Take this step's gradient into `v` and return the diagonal of `S`, positive. All ranks must call this.

        Args:
            space: of the gradient.
            gradient: finite and not zero, this rank's part.
            memory: holds `v`, one vector.
        """
        if _MOMENT not in memory.vectors:
            memory.vectors[_MOMENT] = torch.zeros_like(gradient)
        moment = memory.vectors[_MOMENT]
        moment.mul_(self.decay).addcmul_(gradient, gradient, value=1.0 - self.decay)
        spread = moment.sqrt()
        mean = (space.dots([spread], spread)[0] / space.num_entries) ** 0.5
        if mean == 0.0:  # gradients so small that their squares underflow
            return torch.ones_like(gradient)
        # padding and frozen entries get the largest scale, which multiplies nothing but their zeros
        return spread.div_(mean).add_(self.floor).rsqrt_()
