"""The Lanczos basis of one step: `Q'HQ = T` from products `H q`, with full reorthogonalisation.

Vectors stay where they are (sharded over ranks); only inner products are reduced, two reductions per extension.
"""

import math
from collections.abc import Sequence

import torch

from distributed_unlearn.solvers.protocols import HessianOperator, KrylovEntry, VectorSpace

_BREAKDOWN_EPSILONS = 32.0  # two Gram-Schmidt passes leave a few eps ||Hq|| of rounding; nothing below this is signal


class LanczosBasis:
    """Orthonormal `q_1 = start/||start||, q_2, ...`, grown by one exact product at a time.

    Classical Gram-Schmidt applied twice ("twice is enough", Giraud, Langou, Rozloznik 2005) against all vectors, each
    pass one reduction. The squared norm of the vector travels in the same reduction: after the second pass
    `beta^2 = ||w||^2 - ||c||^2` with `c` the second pass's coefficients, which are rounding-sized, so nothing cancels
    unless the space is invariant. The diagonal of `T` is the sum of both passes' last coefficients.

    All ranks must call every method. One reduction here, two per `extend`, none in `combine`.
    """

    def __init__(self, space: VectorSpace, operator: HessianOperator, start: torch.Tensor) -> None:
        """Take `start` (the gradient), shape (local size,), as the first direction.

        Raises:
            ValueError: `start` is zero or not finite; the caller checks `gradient_norm` first.
        """
        squared = space.dots([start], start)[0]
        if not (squared > 0.0 and math.isfinite(squared)):
            raise ValueError(f"got a start vector with squared norm {squared}; expected a positive finite one")
        self._space, self._operator = space, operator
        self._vectors = [start / math.sqrt(squared)]
        self._num_products = 0
        self._closed = False

    @property
    def vectors(self) -> tuple[torch.Tensor, ...]:
        """Local parts of `q_1, q_2, ...`: one more than `num_products`, or as many after a breakdown."""
        return tuple(self._vectors)

    @property
    def num_products(self) -> int:
        """Exact products so far, the dimension of `T`."""
        return self._num_products

    @property
    def exhausted(self) -> bool:
        """True after a breakdown or a product that was not finite; `extend` then raises."""
        return self._closed

    def extend(self) -> KrylovEntry:
        """One exact product `H q_j`: the next column of `T`, and `q_{j+1}` unless the space is invariant.

        All ranks must call this.

        Returns:
            `<q_j, H q_j>` and `beta_j = ||(I - QQ') H q_j||`, the latter 0.0 when it is below 32 machine epsilons
            (of the vectors' dtype) times `||H q_j||`: a breakdown. Both NaN when the product is not finite; decide
            from the entry, which is the same on all ranks.

        Raises:
            RuntimeError: the space was exhausted by an earlier call.
        """
        if self._closed:
            raise RuntimeError(
                f"the Krylov space of dimension {self._num_products} is exhausted (the last off_diagonal was 0 or "
                "NaN); solve on it as it is"
            )
        product = self._operator(self._vectors[-1])
        self._num_products += 1
        first = self._space.dots([*self._vectors, product], product)
        if not all(math.isfinite(value) for value in first):
            self._closed = True
            return KrylovEntry(math.nan, math.nan)
        # out of place once: the product belongs to the operator, which may reuse its memory
        w = torch.add(product, self._vectors[0], alpha=-first[0])
        for q, coefficient in zip(self._vectors[1:], first[1:-1], strict=True):
            w.add_(q, alpha=-coefficient)
        second = self._space.dots([*self._vectors, w], w)
        for q, coefficient in zip(self._vectors, second[:-1], strict=True):
            w.add_(q, alpha=-coefficient)
        beta = math.sqrt(max(0.0, second[-1] - sum(c * c for c in second[:-1])))
        diagonal = first[-2] + second[-2]
        if beta <= _BREAKDOWN_EPSILONS * torch.finfo(w.dtype).eps * math.sqrt(first[-1]):
            self._closed = True
            return KrylovEntry(diagonal, 0.0)
        self._vectors.append(w.div_(beta))
        return KrylovEntry(diagonal, beta)

    def combine(self, coefficients: Sequence[float]) -> torch.Tensor:
        """Local part of `sum_j coefficients[j] q_j`; no communication.

        Raises:
            ValueError: no coefficient, or more than there are vectors.
        """
        if not 0 < len(coefficients) <= len(self._vectors):
            raise ValueError(f"got {len(coefficients)} coefficients; expected 1 to {len(self._vectors)}")
        total = self._vectors[0] * coefficients[0]
        for q, coefficient in zip(self._vectors[1:], coefficients[1:], strict=False):
            total.add_(q, alpha=coefficient)
        return total
