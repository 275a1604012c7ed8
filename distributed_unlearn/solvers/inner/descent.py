"""The paper's inner solver: gradient descent on the cubic model; it keeps two vectors beside the gradient.

Bui et al., arXiv 2406.14507 (SCureNewton, the cubic sub-solver); the random perturbation of the gradient against the
hard case is that of Carmon and Duchi 2019 and of Tripuraneni et al. 2018, algorithm 3. We scale it by `||g||`, so that
`perturbation` is a pure number.
"""

import math

import torch

from distributed_unlearn.solvers.protocols import HessianOperator, InnerDescentEntry, VectorSpace


class InnerDescent:
    """Iterates `Delta <- Delta - eta (g~ + H Delta + (M/2) ||Delta|| Delta)` from `Delta = 0`.

    `g~ = g + perturbation ||g|| zeta/||zeta||`, `zeta` standard normal. All ranks must call every method.
    """

    def __init__(
        self, space: VectorSpace, operator: HessianOperator, gradient: torch.Tensor, perturbation: float, seed: int
    ) -> None:
        """Draw `zeta` from `seed` (the same on all ranks) and set `Delta = 0`.

        Raises:
            ValueError: a negative `perturbation`.
        """
        if not perturbation >= 0.0:
            raise ValueError(f"got perturbation {perturbation}; expected 0 or more")
        self._space, self._operator, self._gradient = space, operator, gradient
        self._perturbed = gradient
        if perturbation > 0.0:
            zeta = space.random_normal(gradient, seed)
            gradient_norm = math.sqrt(space.dots([gradient], gradient)[0])
            zeta_norm = math.sqrt(space.dots([zeta], zeta)[0])
            self._perturbed = torch.add(gradient, zeta, alpha=perturbation * gradient_norm / zeta_norm)
        self._update = torch.zeros_like(gradient)
        self._at_zero = True

    @property
    def update(self) -> torch.Tensor:
        """Local part of the current `Delta`; it changes with the next `descend`."""
        return self._update

    def descend(self, cubic_coefficient: float, learning_rate: float) -> InnerDescentEntry:
        """One inner step; the scalars are those of the iterate before it. All ranks must call this.

        One exact product and two reductions, but no product at `Delta = 0`, where `H Delta = 0`: k calls cost k - 1
        products. `learning_rate = 0` reads the scalars without moving.

        Args:
            cubic_coefficient: `M >= 0`.
            learning_rate: `eta >= 0`.
        """
        update, gradient, space = self._update, self._gradient, self._space
        product = torch.zeros_like(update) if self._at_zero else self._operator(update)
        squared, gradient_dot, curvature = space.dots([update, gradient, product], update)
        update_norm = math.sqrt(squared)
        model_gradient = torch.add(product, update, alpha=0.5 * cubic_coefficient * update_norm)
        residual = gradient + model_gradient
        residual_norm = math.sqrt(space.dots([residual], residual)[0])
        if learning_rate > 0.0:
            self._update = update - learning_rate * (self._perturbed + model_gradient)
            self._at_zero = False
        return InnerDescentEntry(update_norm, gradient_dot, curvature, residual_norm)
